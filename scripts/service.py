"""A small client of the service for the oracle scripts (standard library only)."""
import json
import pathlib
import time
import urllib.error
import urllib.request

MODELS = pathlib.Path("target/demo/models")
DATA = pathlib.Path("target/oracle/data")


class Service:
    def __init__(self, url):
        self.url = url
        for _ in range(300):
            try:
                return urllib.request.urlopen(url + "/readyz").close()
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise SystemExit("the service does not answer")

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return None if response.status == 204 else json.load(response)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{method} {path}: {error.code} {error.read().decode()}")

    def merge(self, recipe):
        """The folder of a merge's result, and its job."""
        job = self.ask("POST", "/merge", recipe)
        while job["status"] in ("queued", "running"):
            time.sleep(0.1)
            job = self.ask("GET", f"/merge/{job['id']}")
        if job["status"] != "succeeded":
            raise SystemExit(f"{recipe}: {job['status']} {job['error']}")
        return DATA / "checkpoints" / job["digest"], job

    def load(self, name, source, **more):
        self.ask("POST", "/models", {"name": name, "source": source} | more)
        while (slot := self.ask("GET", f"/models/{name}"))["status"] == "loading":
            time.sleep(0.1)
        if slot["status"] != "ready":
            raise SystemExit(f"{name}: {slot['error']}")
        return slot
