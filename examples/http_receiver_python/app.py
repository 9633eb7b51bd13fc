import base64
import hmac
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = base64.b64decode(os.environ["CDC_DELIVER_SECRET"].removeprefix("whsec_"))


def genuine(headers, body):
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    ours = b"v1," + base64.b64encode(hmac.digest(KEY, signed, "sha256"))
    theirs = str(headers["webhook-signature"]).encode().split()
    recent = abs(time.time() - float(headers["webhook-timestamp"] or 0)) < 300
    return recent and any(hmac.compare_digest(ours, each) for each in theirs)


class Application(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # so that connections are used again

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        status = 200 if genuine(self.headers, body) else 401
        if status == 200:
            try:
                event = json.loads(body)
                # Here is your work. The id tells what was seen before.
                print(f"{event['id']} {event['type']} {event['data']['new']}", flush=True)
            except Exception:
                status = 500  # to be tried again
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()


ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "3000"))), Application).serve_forever()
