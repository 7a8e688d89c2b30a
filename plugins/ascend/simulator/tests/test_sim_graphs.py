"""ACL graphs of the simulator under the vendor's own NPUGraph: replays use the capture's addresses and host arguments;
what is stale, unsupported or too much is refused."""

from __future__ import annotations

import contextlib
import ctypes

import pytest

pytest.importorskip("anychip_npu_simulator.runtime", reason="needs torch_npu: make ascend-test", exc_type=ImportError)

import torch
import torch_npu
from torch import Tensor

HEADS, GROUPS, DIM = 4, 2, 16
OP = torch.ops.npu.npu_fused_infer_attention_score


class Case:
    """One attention call over a paged cache, whose lengths differ from step to step."""

    def __init__(self) -> None:
        self.query = torch.randn(2, HEADS, DIM).half().npu()
        self.key, self.value = (torch.randn(4, 128, GROUPS * DIM).half().npu() for _ in range(2))
        self.rest = {
            "atten_mask": torch.triu(torch.ones(2048, 2048, dtype=torch.bool), 1).npu(),
            "block_table": torch.arange(4, dtype=torch.int32).view(2, 2).npu(), "actual_seq_lengths": [1, 2],
            "num_heads": HEADS, "num_key_value_heads": GROUPS, "input_layout": "TND", "sparse_mode": 3,
            "block_size": 128, "scale": 0.25,
        }  # fmt: skip
        self.out, self.sums = torch.zeros_like(self.query), torch.empty(0, device="npu")
        self.stream = torch.npu.Stream()

    def eager(self, lengths: list[int]) -> Tensor:
        return OP(self.query, self.key, self.value, actual_seq_lengths_kv=lengths, **self.rest)[0]

    def workspace(self) -> Tensor:
        ask = torch_npu._npu_fused_infer_attention_score_get_max_workspace
        return ask(self.query, self.key, self.value, actual_seq_lengths_kv=[256, 256], **self.rest)

    def into_out(self, lengths: list[int], workspace: Tensor | None, **changes) -> None:
        given = {"workspace": workspace, "out": [self.out, self.sums], "actual_seq_lengths_kv": lengths} | changes
        OP.out(self.query, self.key, self.value, **self.rest | given)

    def capture(self, lengths: list[int]) -> None:
        self.graph = torch.npu.NPUGraph()
        self.held = self.workspace()
        with torch.npu.graph(self.graph):
            stream = torch.npu.current_stream()
            torch.npu.graph_task_group_begin(stream)
            self.into_out(lengths, self.held)
            self.group = torch.npu.graph_task_group_end(stream)
            self.after = self.out + 1

    def update(self, lengths: list[int], **changes) -> None:
        with torch.npu.stream(self.stream):
            torch.npu.graph_task_update_begin(self.stream, self.group)
            try:
                self.into_out(lengths, **{"workspace": self.held} | changes)
            except RuntimeError:
                with contextlib.suppress(RuntimeError):
                    torch.npu.graph_task_update_end(self.stream)
                raise
            torch.npu.graph_task_update_end(self.stream)


def test_a_replay_computes_with_what_lies_at_the_captures_addresses():
    x, graph = torch.ones(4, device="npu"), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = (x * 2).cumsum(0)
    x.fill_(3)
    graph.replay()
    assert y.tolist() == [6, 12, 18, 24]


def test_replays_change_in_place_what_the_capture_changed():
    x, index, graph = torch.zeros(3, device="npu"), torch.tensor([1], device="npu"), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        x.index_add_(0, index, torch.ones(1, device="npu"))
        x[0] = 5.0
        x.view(3, 1)[2] = x[1]
    before = float(x[1])
    index.fill_(2)
    graph.replay()
    graph.replay()
    assert x.tolist() == [5.0, before, before]


def test_renewed_lengths_are_those_of_the_replay():
    case = Case()
    case.capture([3, 4])
    for lengths in ([7, 200], [130, 1]):
        case.query.copy_(torch.randn(2, HEADS, DIM))
        case.update(lengths)
        case.graph.replay()
        assert torch.equal(case.out, case.eager(lengths)) and torch.equal(case.after, case.out + 1)


def test_stale_lengths_are_refused():
    case = Case()
    case.capture([3, 4])
    with pytest.raises(RuntimeError, match=r"npu_fused_infer_attention_score.out: actual_seq_lengths.* is stale"):
        case.graph.replay()
    case.update([5, 6])
    case.graph.replay()
    with pytest.raises(RuntimeError, match="is stale"):
        case.graph.replay()


def test_stale_lengths_show_in_the_results_where_they_are_allowed(monkeypatch):
    monkeypatch.setenv("NPU_SIMULATOR_STALE", "allow")
    case = Case()
    case.capture([3, 4])
    case.graph.replay()
    assert torch.equal(case.out, case.eager([3, 4])) and not torch.equal(case.out, case.eager([9, 9]))


def test_lengths_outside_of_a_task_group_are_refused_at_the_replay():
    case, graph = Case(), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        case.eager([3, 4])
    with pytest.raises(RuntimeError, match="outside of a task group"):
        graph.replay()


def test_the_vendors_own_dispatch_of_task_groups_runs():
    case, graph = Case(), torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        out = case.eager([3, 4])
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [60, 131]}])
    graph.replay()
    assert torch.equal(out, case.eager([60, 131]))


def test_a_workspace_that_is_too_small_is_refused():
    case = Case()
    with pytest.raises(RuntimeError, match=r"workspace is 16 bytes"):
        case.into_out([3, 4], torch.empty(16, dtype=torch.uint8, device="npu"))


def test_an_update_without_a_workspace_is_refused():
    case = Case()
    case.capture([3, 4])
    with pytest.raises(RuntimeError, match=r"workspace is None"):
        case.update([5, 6], workspace=None)


def test_an_update_that_writes_elsewhere_is_refused():
    case = Case()
    case.capture([3, 4])
    with pytest.raises(RuntimeError, match="out is at other addresses"):
        case.update([5, 6], out=[torch.zeros_like(case.out), case.sums])


def test_an_update_without_the_captured_calls_is_refused():
    case = Case()
    case.capture([3, 4])
    with pytest.raises(RuntimeError, match=r"1 tasks were captured, 0 came"), torch.npu.stream(case.stream):
        torch.npu.graph_task_update_begin(case.stream, case.group)
        torch.npu.graph_task_update_end(case.stream)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: float(x[0]),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.copy_(torch.ones(4)),
    ],
)
def test_reads_on_the_host_are_refused_within_a_capture(read):
    x, graph = torch.ones(4, device="npu"), torch.npu.NPUGraph()
    with pytest.raises(RuntimeError, match=r"within a captured graph|capture is invalid"), torch.npu.graph(graph):
        read(x)


def test_too_many_graphs_are_refused_with_the_vendors_code(monkeypatch):
    held = [torch.npu.NPUGraph()]
    x = torch.ones(1, device="npu")
    with torch.npu.graph(held[0]):
        x + 1
    made = torch.npu.NPUGraph()  # what streams it makes by itself are counted
    with torch.npu.graph(made):
        x + 1
    monkeypatch.setenv("NPU_SIMULATOR_STREAMS", "1")
    with pytest.raises(RuntimeError, match=r"(?s)207008.*no stream resource"), torch.npu.graph(torch.npu.NPUGraph()):
        x + 1


def test_graphs_that_are_gone_give_their_streams_back():
    ask, left = ctypes.CDLL("libascendcl.so").aclrtGetStreamAvailableNum, ctypes.c_uint32()
    x, graph = torch.ones(1, device="npu"), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        x + 1
    assert ask(ctypes.byref(left)) == 0
    with_graph = left.value
    graph.reset()
    ask(ctypes.byref(left))
    assert left.value == with_graph + 1


def test_a_310p_has_no_graphs(monkeypatch):
    monkeypatch.setenv("NPU_SIMULATOR_SOC", "Ascend310P3")
    with pytest.raises(RuntimeError, match=r"310P has no ACL graphs"), torch.npu.graph(torch.npu.NPUGraph()):
        pass
