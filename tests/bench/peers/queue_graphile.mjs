// graphile-worker emptying a queue of no-op jobs: node queue_graphile.mjs FOLDER JOBS HOST PORT USER DATABASE
//
// FOLDER is where it is installed. Its own figures are made with these settings: a local queue, completions in batches.
// Prints one JSON line, as settled.py says. It deletes what is done, so that the end is when the table is empty.
import { createRequire } from "node:module";
import { setTimeout as pause } from "node:timers/promises";

const [folder, jobs, host, port, user, database] = process.argv.slice(2);
const require = createRequire(`${folder}/`);
const { run, makeWorkerUtils, Logger } = require("graphile-worker");
const { Pool } = require("pg");
const { version } = require("graphile-worker/package.json");

const pool = new Pool({ host, port: Number(port), user, database, max: 25 });
const logger = new Logger(() => () => {});
const utils = await makeWorkerUtils({ pgPool: pool, logger });
await utils.migrate();
// As many at once: add_job for each would take ten times as long as to empty the queue.
await pool.query(
  "SELECT count(*) FROM graphile_worker.add_jobs(ARRAY(SELECT ('noop', json_build_object('n', n), null, null, null, null," +
    " null, null)::graphile_worker.job_spec FROM generate_series(1, $1::int) AS n))",
  [jobs],
);
await pool.query("VACUUM ANALYZE");

let calls = 0;
let began;
let allCalled;
const called = new Promise((resolve) => (allCalled = resolve));
const noop = async () => {
  if (!calls++) began = performance.now();
  if (calls === Number(jobs)) allCalled();
};
const preset = {
  worker: { concurrentJobs: 24, maxPoolSize: 25, localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 },
};
const runner = await run({ pgPool: pool, preset, logger, noHandleSignals: true, taskList: { noop } });
await called;
for (;;) {
  const { rows } = await pool.query("SELECT EXISTS (SELECT FROM graphile_worker._private_jobs) AS left");
  if (!rows[0].left) break;
  await pause(5);
}
const seconds = (performance.now() - began) / 1000;
await runner.stop();
await utils.release();
await pool.end();
console.log(JSON.stringify({ version, settled: Number(jobs), thirds: [null, null, seconds] }));
