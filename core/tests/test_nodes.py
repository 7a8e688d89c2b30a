"""A server whose ranks are on two hosts: it answers as one, and what is lost is named and replaced."""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from pathlib import Path

import pytest
from served import children
from two_hosts import Link, NamespaceLink, TwoHosts, can_make_namespaces

from anychip import LLM, SamplingParams

PROMPT = [5 + (i * 37) % 500 for i in range(30)]
NUM_TOKENS = 12
OPTIONS = ("--dtype", "float32", "--kv-cache-bytes", "16M", "--generation-config", "none")


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """From one process."""
    with LLM(device="cpu", dtype="float32", kv_cache_bytes=16 << 20) as llm:
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        (output,) = llm.generate([PROMPT], sampling)
        return list(output.outputs[0].token_ids)


@pytest.fixture
def link():
    made = NamespaceLink() if can_make_namespaces() else Link()
    yield made
    made.close()


def error_of_a_long_stream(hosts: TwoHosts, harm) -> str:
    """What a request that is open when `harm` is done to the hosts ends with."""
    body = {"prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    harmed, text = False, ""
    with hosts.client.stream("POST", "/v1/completions", json=body) as response:
        for chunk in response.iter_text():
            text += chunk
            if not harmed and text:
                harm()
                harmed = True
    last = [line for line in text.split("\n\n") if line.strip()]
    errors = [json.loads(line.removeprefix("data: ")) for line in last if '"error"' in line]
    assert harmed and errors, text[-500:]
    return errors[-1]["error"]["message"]


def processes_of(parent: int, module: bytes) -> list[int]:
    return [pid for pid in children(parent) if module in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if "(zombie)" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    "axis", ["tensor", *(pytest.param(axis, marks=pytest.mark.full) for axis in ("pipeline", "data"))]
)
def test_two_hosts_answer_as_one_and_a_killed_rank_is_replaced(link, expected, axis):
    hosts = TwoHosts(link, *OPTIONS, axis=axis)
    try:
        hosts.await_ready()
        assert hosts.tokens(PROMPT, NUM_TOKENS) == expected
        (worker,) = processes_of(hosts.agent.pid, b"worker_main")
        cause = error_of_a_long_stream(hosts, lambda: os.kill(worker, signal.SIGKILL))
        assert "worker 1" in cause or "a rank is gone" in cause  # whoever notices first
        hosts.await_ready()
        assert hosts.tokens(PROMPT, NUM_TOKENS) == expected
        (replaced,) = processes_of(hosts.agent.pid, b"worker_main")
        assert replaced != worker and hosts.agent.poll() is None
    finally:
        statuses = hosts.close()
    assert statuses == (0, 0)
    assert is_gone(replaced)


def test_who_has_another_key_does_not_join_and_the_missing_host_is_named(link):
    hosts = TwoHosts(link, *OPTIONS, "--start-timeout-s", "8")
    try:
        hosts.agent.kill()
        stranger = hosts.key.with_name("other")
        stranger.write_text(secrets.token_hex(32))
        hosts.agent = hosts.join(stranger)
        assert hosts.server.wait(60) == 2
        log = hosts.log()
        assert f"for host {link.addresses[1]} to join, 8 s may pass; run on each: anychip join" in log
        assert f"host {link.addresses[1]} has joined" not in log
    finally:
        hosts.close()


@pytest.mark.full
def test_an_agent_that_is_killed_and_comes_again_is_let_in(link, expected):
    hosts = TwoHosts(link, *OPTIONS)
    try:
        hosts.await_ready()
        old = hosts.agent
        cause = error_of_a_long_stream(hosts, old.kill)
        assert any(words in cause for words in ("worker 1", "a rank is gone", f"host {link.addresses[1]} is gone"))
        hosts.agent = hosts.join()
        hosts.await_ready()
        assert hosts.tokens(PROMPT, NUM_TOKENS) == expected
    finally:
        statuses = hosts.close()
    assert statuses == (0, 0)


@pytest.mark.full
def test_the_hosts_of_an_engine_that_is_killed_come_to_the_next(link, expected):
    hosts = TwoHosts(link, *OPTIONS)
    try:
        hosts.await_ready()
        (engine,) = processes_of(hosts.server.pid, b"engine_main")
        (old,) = processes_of(hosts.agent.pid, b"worker_main")
        cause = error_of_a_long_stream(hosts, lambda: os.kill(engine, signal.SIGKILL))
        assert "was killed by signal 9" in cause
        hosts.await_ready()
        assert hosts.tokens(PROMPT, NUM_TOKENS) == expected
        assert is_gone(old)
    finally:
        statuses = hosts.close()
    assert statuses == (0, 0)


@pytest.mark.full
@pytest.mark.skipif(not can_make_namespaces(), reason="a link that can be cut needs network namespaces")
def test_a_link_that_is_cut_ends_requests_with_the_hosts_name_and_the_engine_comes_back(link, expected):
    hosts = TwoHosts(link, *OPTIONS)
    try:
        hosts.await_ready()
        cause = error_of_a_long_stream(hosts, lambda: link.drop(dropped=True))
        assert f"host {link.addresses[1]} is gone" in cause
        time.sleep(10)
        link.drop(dropped=False)
        hosts.await_ready()
        assert hosts.tokens(PROMPT, NUM_TOKENS) == expected
    finally:
        statuses = hosts.close()
    assert statuses == (0, 0)
