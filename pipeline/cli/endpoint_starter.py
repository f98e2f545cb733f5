"""Files of ``init --template endpoint``: a job spec with a service, texts, and a stand-in for the service."""

from __future__ import annotations

JOB = """\
# Runs as it is once the stand-in answers: python stand_in.py &  then: python -m pipeline run job.yaml
# For your own service change url and model, and name the variable of the key. docs/endpoints.md has every field.
name: {name}

source: {{path: data/}}

steps:
  - score:
      endpoint:
        # The base of vLLM, llama.cpp's server, Ollama or a hosted service.
        url: http://127.0.0.1:8000/v1
        model: {model}
        # For a service that asks for a key, a variable of driver and workers that has it:
        # key: env:SERVICE_KEY
        messages:
          - {{role: system, content: You rate what customers write.}}
          - {{role: user, content: "{{{{text}}}}"}}
        # Each field is a column: rating_mood and rating_stars.
        answer: {{mood: [good, bad], stars: int64}}
        temperature: 0
        max_tokens: 50
        # In a worker; and in the whole job:
        concurrency: 8
        requests_per_minute: 6000
        # Money per million tokens, for the cost in the report.
        prices: {{input: 0.15, output: 0.60}}
      output: {output}
      keep: [id]

sink: {{path: scored/, mode: overwrite}}

# Rows that the service refuses, or whose answer is not as asked for, are kept with the reason.
errors: {{max_fraction: 0.01}}

cluster: {cluster}
"""
DATA = '''\
"""Makes what job.yaml reads: data/. Replace it by your own."""

from pathlib import Path

import pandas as pd

words = ["Good value, will come again.", "It broke after a day.", "Fine.", "Too late, and the wrong colour."]
table = pd.DataFrame({"id": range(400), "text": [f"{words[number % 4]} Order {number}." for number in range(400)]})
Path("data").mkdir(exist_ok=True)
for part in range(4):
    table[part::4].to_parquet(f"data/part-{part}.parquet", index=False)
'''
STAND_IN = '''\
"""A stand-in for the service of job.yaml, for a first trial: python stand_in.py [PORT]"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Service(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send({"data": [{"id": "stand-in"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        is_good = "Good" in text or "Fine" in text
        answer = json.dumps({"mood": "good" if is_good else "bad", "stars": 5 if is_good else 1})
        message = {"finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
        usage = {"prompt_tokens": len(text.split()), "completion_tokens": 12}
        self.send({"choices": [message], "usage": usage})

    def send(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000), Service)
print(f"answers at http://127.0.0.1:{server.server_port}/v1", flush=True)
server.serve_forever()
'''
