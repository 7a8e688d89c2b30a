"""A scheduler without a device: requests in a line, results made up, steps late on purpose."""

from __future__ import annotations

from array import array
from collections import deque

from anychip.engine.engine_core import EngineCore
from anychip.kv_cache.manager import KVCacheManager
from anychip.messages import AdapterReport, AddRequest, DropAdapter, LoadAdapter
from anychip.request import Request
from anychip.sampling_params import SamplingParams
from anychip.scheduler.policy import SchedulingPolicy
from anychip.scheduler.scheduler import Scheduler
from anychip.speculation.speculator import Speculator
from anychip.step_messages import LateInputs, StepDecision, StepResult
from anychip.types import RequestId
from anychip.worker_report import CacheGroup, DeviceRules, KVCacheConfig, KVGroup, MemoryPlan, StateGroup, WorkerReady

VOCAB_SIZE = 1000
TOKEN = 7


def make_scheduler(
    *,
    num_blocks: int = 64,
    groups: tuple[CacheGroup, ...] = (KVGroup(block_size=4),),
    num_states: int | None = None,
    max_num_seqs: int = 8,
    budget: int = 64,
    prefix_caching: bool = True,
    rules: DeviceRules | None = None,
    policy: SchedulingPolicy | None = None,
    speculator: Speculator | None = None,
    max_adapters: int = 0,
    num_stages: int = 1,
) -> Scheduler:
    if num_states is None:  # with block 0, and one to spare
        num_states = max_num_seqs + 2 if any(isinstance(group, StateGroup) for group in groups) else 0
    return Scheduler(
        kv=KVCacheManager(KVCacheConfig(num_blocks, groups, num_states), prefix_caching=prefix_caching),
        policy=policy or SchedulingPolicy(),
        rules=rules or DeviceRules(),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        speculator=speculator,
        max_adapters=max_adapters,
        num_stages=num_stages,
    )


def make_request(name: str, prompt: list[int], *, max_output: int = 4, arrival: int = 0, **more: object) -> Request:
    return Request(
        request_id=RequestId(name),
        index=0,
        prompt=array("i", prompt).tobytes(),
        sampling=SamplingParams(max_tokens=max_output),
        max_output=max_output,
        stop_ids=frozenset({2}),
        seed=0,
        arrival=arrival,
        **more,  # type: ignore[arg-type]
    )


def answer(scheduler: Scheduler, step, token: int = TOKEN):
    """The step's result, every sampling row the same token, taken in."""
    ids = array("i", [token] * len(step.sampling)).tobytes()
    return scheduler.update(step, StepResult(step.decision.step_id, ids, {}))


def run_to_end(scheduler: Scheduler, *, limit: int = 1000) -> list:
    """Steps in order until nobody is left; every delta."""
    deltas = []
    for _ in range(limit):
        step = scheduler.schedule()
        if step is None:
            assert not scheduler.has_work, "requests are left and nothing is scheduled"
            return deltas
        deltas += answer(scheduler, step)
    raise AssertionError("the workload did not end")


def counts(decision: StepDecision) -> list[int]:
    found = array("i")
    found.frombytes(decision.num_tokens)
    return list(found)


class FakeExecutor:
    """Answers each step when it is collected; remembers the order of calls."""

    def __init__(self, kv: KVCacheConfig, *, token_of=lambda step_id, row: TOKEN) -> None:
        memory = MemoryPlan(0, 0, 0, 0, kv.num_blocks, 0, 0.0)
        self.ready = WorkerReady(kv, DeviceRules(), memory, "fake:0")
        self.calls: list[str] = []
        self.late: list[LateInputs] = []
        self._sampling: dict[int, int] = {}
        self._pending: deque[int] = deque()
        self._token_of = token_of
        self.reports: list[AdapterReport] = []
        self.adapters: set[bytes] = set()

    def expect(self, step_id: int, rows: int) -> None:
        self._sampling[step_id] = rows

    def load_adapter(self, message: LoadAdapter) -> None:
        self.adapters.add(message.digest)
        self.reports.append(AdapterReport(message.digest))

    def drop_adapter(self, message: DropAdapter) -> None:
        self.adapters.remove(message.digest)

    def adapter_reports(self) -> list[AdapterReport]:
        reports, self.reports = self.reports, []
        return reports

    def launch(self, decision: StepDecision) -> None:
        missing = [each for each in decision.adapters if each.digest not in self.adapters]
        assert not missing, f"slots are filled with adapters that are not here: {missing}"
        self.calls.append(f"launch {decision.step_id}")
        self._pending.append(decision.step_id)

    def sample(self, late: LateInputs) -> None:
        self.calls.append(f"sample {late.step_id}")
        self.late.append(late)

    def collect(self) -> StepResult:
        step_id = self._pending.popleft()
        self.calls.append(f"collect {step_id}")
        ids = [self._token_of(step_id, row) for row in range(self._sampling[step_id])]
        return StepResult(step_id, array("i", ids).tobytes(), {})

    def check(self) -> None:
        self.calls.append("check")

    def close(self, reason: str) -> None:
        self.calls.append("close")


def load_adapters(core: EngineCore, *digests: bytes) -> None:
    for digest in digests:
        core.adapters.load(LoadAdapter(digest, "somewhere"))
    assert [report.digest for report in core.tend_adapters()] == list(digests)


def make_core(scheduler: Scheduler, *, max_in_flight: int = 1, seed: int = 0, **executor: object) -> EngineCore:
    num_states = 0 if scheduler.kv.states is None else scheduler.kv.states.num_blocks
    kv = KVCacheConfig(scheduler.kv.pool.num_blocks, scheduler.kv.groups, num_states)
    fake = FakeExecutor(kv, **executor)  # type: ignore[arg-type]
    schedule = scheduler.schedule

    def watched():
        step = schedule()
        if step is not None:
            fake.expect(step.decision.step_id, len(step.sampling))
        return step

    scheduler.schedule = watched  # type: ignore[method-assign]
    return EngineCore(
        scheduler=scheduler,
        executor=fake,
        vocab_size=VOCAB_SIZE,
        max_model_len=4096,
        max_in_flight=max_in_flight,
        max_waiting=64,
        max_waiting_tokens=100_000,
        seed=seed,
    )


def add_message(name: str, prompt: list[int], *, max_output: int = 4, **sampling: object) -> AddRequest:
    return AddRequest(
        name,
        array("i", prompt).tobytes(),
        SamplingParams(max_tokens=max_output, **sampling),
        max_output,
        (2,),  # type: ignore[arg-type]
    )
