"""The live service: a published release answered over HTTP by Ray Serve.

Reading order: `schema` (arguments and JSON), `app` (what is deployed), `routes` (the HTTP surface), `service` (what a
request does), `encoder` and `index` (the two deployments behind it). `../audiomae` does the actual work.
"""
