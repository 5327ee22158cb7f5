"""A real SGLang server for the length of a `with` block.

Starts `python -m sglang.launch_server` in a process group of its own, waits until it answers, and on the way out kills
the group and checks that none of its processes is left. On a machine without a GPU it adds what keeps the server small.

    with Server(model, "--speculative-algorithm", "SPARSESPEC") as server:
        response = server.generate({"text": "Hello", "sampling_params": {"temperature": 0, "max_new_tokens": 8}})
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

import psutil
import requests

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CPU_SERVER: dict[str, str | None] = {"--device": "cpu"}
# what stock SGLang needs on top to serve without a GPU; SPARSESPEC chooses for itself
PLAIN_CPU_SERVER: dict[str, str | None] = {"--attention-backend": "torch_native", "--disable-overlap-schedule": None}
LOG_TAIL_LINES = 60
_ports_given: set[int] = set()
# kills the group when the process that started it ends without stopping its server, however it ends
WATCHDOG = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


class ServerError(RuntimeError):
    """The server did not start, died, or answered with an error; carries the log's tail where that helps."""


class Server:
    """Context manager around one server process group.

    Args:
        model_path: checkpoint folder.
        args: server arguments; they win over the defaults of the class and of the machine.
        env: environment variables added to the current ones; None as a value removes one.
        command: what comes before the arguments (default: this Python and its `sglang.launch_server`).
        timeout_s: how long start-up may take.
        request_timeout_s: how long one request may take.
    """

    live: ClassVar[set[Server]] = set()
    """Servers that are up now; the tests attach their logs to a failure."""
    defaults: ClassVar[dict[str, str | None]] = {}
    """Options of every server of this class unless it is given them; None is a switch."""
    cpu_defaults: ClassVar[dict[str, str | None]] = {}
    """The same, on a machine without a GPU alone."""

    def __init__(
        self,
        model_path: str | Path,
        *args: str,
        env: Mapping[str, str | None] | None = None,
        command: list[str] | None = None,
        cwd: str | Path | None = None,
        timeout_s: float = 300,
        request_timeout_s: float = 300,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.timeout_s = timeout_s
        self.request_timeout_s = request_timeout_s
        self.keep_log = False
        self.startup_s = 0.0
        self._launched = 0.0
        self._env = server_env(env)
        self._cwd = cwd
        self.command = [*(command or [sys.executable, "-m", "sglang.launch_server"])]
        self.command += ["--model-path", str(model_path), "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += self.with_defaults(args)
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._descendants: dict[int, psutil.Process] = {}
        self._log: IO[bytes] | None = None
        self.log_path = Path()

    @classmethod
    def with_defaults(cls, args: tuple[str, ...]) -> list[str]:
        """`args` and, of the defaults, those that `args` does not set."""
        defaults = dict(cls.defaults)
        if not has_gpu():
            defaults.update(CPU_SERVER | cls.cpu_defaults)
            if not any(arg.startswith("--speculative-algorithm") for arg in args):
                defaults.update(PLAIN_CPU_SERVER)
        given = {arg.split("=", 1)[0] for arg in args}
        merged = list(args)
        for name, value in defaults.items():
            if name not in given:
                merged += [name] if value is None else [name, value]
        return merged

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        self.keep_log |= exc_type is not None
        self.stop()

    def start(self) -> None:
        self.launch()
        self.wait_until_healthy()

    def launch(self) -> None:
        """The first half of `start`: several servers start in the time of the slowest."""
        fd, name = tempfile.mkstemp(prefix=f"sglang-{self.port}-", suffix=".log")
        self.log_path = Path(name)
        self._log = os.fdopen(fd, "wb")
        self._process = subprocess.Popen(
            self.command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=self._env,
            cwd=self._cwd,
            start_new_session=True,
        )
        self._watchdog = subprocess.Popen(
            [sys.executable, "-c", WATCHDOG, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._launched = time.monotonic()
        Server.live.add(self)

    def wait_until_healthy(self) -> None:
        """The other half; a server that fails is stopped."""
        try:
            self._poll_health()
        except BaseException:
            self.keep_log = True
            self.stop()
            raise

    def _poll_health(self) -> None:
        while True:
            self.check_alive("while starting")
            with contextlib.suppress(requests.RequestException):
                if requests.get(self.url + "/health", timeout=10).status_code == 200:
                    self.startup_s = time.monotonic() - self._launched
                    return
            # after a look: whoever launched several may come late to this one
            if time.monotonic() >= self._launched + self.timeout_s:
                raise ServerError(f"no answer from /health within {self.timeout_s:.0f} s\n{self.describe()}")
            time.sleep(1.0)

    def stop(self) -> None:
        """Kill the process group, wait for it, and raise if one of its processes survives."""
        if self._process is None:
            return
        Server.live.discard(self)
        process, self._process = self._process, None
        self._note_descendants(process.pid)
        # SIGTERM drains the requests in flight first; nobody here waits for them
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.communicate()
        members = list(self._descendants.values())
        _, left = psutil.wait_procs(members, timeout=15)
        left = [member for member in left if is_running(member)]
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        if self._log is not None:
            self._log.close()
        if self.keep_log:
            print(f"server log kept: {self.log_path}", file=sys.stderr)
        else:
            self.log_path.unlink(missing_ok=True)
        if left:
            raise ServerError(f"processes outlived their server: {[(p.pid, p.name()) for p in left if p.is_running()]}")

    def _note_descendants(self, pid: int) -> None:
        """Remember every process of ours while the tree still shows whose it is (children of the dead move to init)."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(pid).children(recursive=True):
                self._descendants[child.pid] = child
        for candidate in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(candidate.pid) == pid and candidate.pid != pid:
                    self._descendants[candidate.pid] = candidate

    # what one asks of a running server

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def check_alive(self, when: str) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise ServerError(f"the server died {when}, exit code {self._process.returncode}\n{self.describe()}")

    def request(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        """The raw response.

        Raises:
            ServerError: if there is none: the server is dead, hung, or broke off.
        """
        kwargs.setdefault("timeout", self.request_timeout_s)
        try:
            return requests.request(method, self.url + path, **kwargs)
        except requests.RequestException as error:
            if isinstance(error, requests.ConnectionError) and self._process is not None:
                # the launcher ends a moment after the scheduler that failed
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=10)
            self.check_alive(f"during {path}")
            raise ServerError(f"no answer from {path}: {error!r}\n{self.describe()}") from error

    def post(self, path: str, payload: Mapping[str, Any], **kwargs: Any) -> requests.Response:
        """The raw response, for tests of refusals."""
        return self.request("POST", path, json=payload, **kwargs)

    def get(self, path: str) -> Any:
        return self._json(self.request("GET", path))

    def generate(self, payload: Mapping[str, Any]) -> Any:
        """POST /generate: a dict, or a list of dicts for a batch."""
        return self._json(self.post("/generate", payload))

    def chat(self, messages: str | list[dict[str, str]], **options: Any) -> Any:
        """POST /v1/chat/completions; a plain string is one user message."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self._json(self.post("/v1/chat/completions", {"model": "default", "messages": messages, **options}))

    def stream(self, path: str, payload: Mapping[str, Any]) -> Iterator[Any]:
        """The JSON documents of a server-sent event stream, as they arrive."""
        with self.post(path, {**payload, "stream": True}, stream=True) as response:
            if response.status_code != 200:
                self._json(response)
            try:
                for line in response.iter_lines():
                    if line.startswith(b"data: ") and line != b"data: [DONE]":
                        yield json.loads(line[len(b"data: ") :])
            except requests.RequestException as error:
                self.check_alive(f"during {path}")
                raise ServerError(f"the stream of {path} broke off: {error!r}") from error

    def flush_cache(self) -> None:
        response = self.request("POST", "/flush_cache")
        if response.status_code != 200:
            raise ServerError(f"/flush_cache answered {response.status_code}: {response.text[:500]}")

    def accept_length(self) -> float | None:
        """Completion tokens per verify since the start; None where nothing was verified."""
        return self.get("/server_info")["internal_states"][0].get("avg_spec_accept_length")

    def loads(self) -> dict[str, Any]:
        """Scheduler counters of the first rank: num_running_reqs, num_waiting_reqs, num_used_tokens, ..."""
        return self.get("/v1/loads")["loads"][0]

    def idle_check(self, timeout_s: float = 30) -> None:
        """Wait for the last request to end, then require that the server is alive and well.

        SGLang checks its own memory pools whenever it is idle and dies if a slot is lost, so being alive afterwards
        says that every KV slot came back.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.check_alive("while becoming idle")
            load = self.loads()
            if load["num_running_reqs"] == 0 and load["num_waiting_reqs"] == 0:
                break
            if time.monotonic() > deadline:
                raise ServerError(f"not idle after {timeout_s:.0f} s: {load}\n{self.describe()}")
            time.sleep(0.2)
        time.sleep(1.0)  # one idle pass of the scheduler at least
        self.check_alive("when idle")
        if self.request("GET", "/health").status_code != 200:
            raise ServerError(f"unhealthy when idle\n{self.describe()}")

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.is_file() else ""

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def describe(self) -> str:
        return f"command: {' '.join(self.command)}\nlog: {self.log_path}, its tail:\n{self.log_tail()}"

    def _json(self, response: requests.Response) -> Any:
        if response.status_code != 200:
            raise ServerError(f"{response.url} answered {response.status_code}: {response.text[:2000]}")
        return response.json()


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def server_env(extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
    env = dict(os.environ)
    # two threads: runners have two cores, and results then do not depend on the machine's count
    env.update(OMP_NUM_THREADS="2", HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1", TOKENIZERS_PARALLELISM="false")
    # set for tests of Triton kernels without a GPU; a server has no use for it
    env.pop("TRITON_INTERPRET", None)
    for name, value in (extra or {}).items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = value
    return env


def free_port() -> int:
    """A free TCP port below the range that the system gives to outgoing connections; no port twice in a process, for
    servers that start at the same time do not hold theirs yet."""
    for _ in range(100):
        port = random.SystemRandom().randrange(20000, 30000)
        if port in _ports_given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _ports_given.add(port)
            return port
    raise ServerError("no free port between 20000 and 30000")
