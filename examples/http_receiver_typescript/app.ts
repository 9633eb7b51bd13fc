import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer, type IncomingMessage } from "node:http";

const key = Buffer.from(process.env.CDC_DELIVER_SECRET!.slice("whsec_".length), "base64");

function genuine({ headers }: IncomingMessage, body: Buffer): boolean {
  const [id, time] = [headers["webhook-id"], headers["webhook-timestamp"]];
  const ours = createHmac("sha256", key).update(`${id}.${time}.`).update(body).digest();
  const theirs = String(headers["webhook-signature"]).split(" ").map((each) => Buffer.from(each.slice(3), "base64"));
  const recent = Math.abs(Date.now() / 1000 - Number(time)) < 300;
  return recent && theirs.some((each) => each.length === ours.length && timingSafeEqual(each, ours));
}

createServer(async (request, response) => {
  const chunks: Buffer[] = [];
  for await (const chunk of request) chunks.push(chunk);
  const body = Buffer.concat(chunks);
  if (!genuine(request, body)) return response.writeHead(401).end();
  try {
    const { id, type, data } = JSON.parse(body.toString());
    console.log(id, type, data.new); // Here is your work. The id tells what was seen before.
    response.writeHead(204).end();
  } catch {
    response.writeHead(500).end(); // to be tried again
  }
}).listen(Number(process.env.PORT ?? 3000), "127.0.0.1");
