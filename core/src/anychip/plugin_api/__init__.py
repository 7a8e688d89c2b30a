"""The vendor's whole world: what a plugin implements and what it may import. Importing it needs no torch.

Start at PlatformManifest and Platform; docs/writing-a-plugin.md walks through them.
"""

from anychip.config import EngineConfig
from anychip.errors import DeviceFault, Unsupported
from anychip.plugin_api.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    KVLayout,
    PartialAttention,
    dense_page_bytes,
)
from anychip.plugin_api.capabilities import Capabilities, GraphLevel, StepLimits, StepRules
from anychip.plugin_api.communicator import Communicator, GroupSpec
from anychip.plugin_api.forward_extras import FINAL, ForwardExtras, Turning
from anychip.plugin_api.graph import (
    DRAFTS,
    EDITS,
    EMBEDDINGS,
    LOGPROBS,
    MASKS,
    MROPE,
    POOLED,
    SCORES,
    TAPS,
    EagerCall,
    GraphCapture,
    PlannedCall,
    RegionCompiler,
    RunOutsideGraph,
    ShapeKey,
    ShapePolicy,
    forward_features,
    sampling_features,
)
from anychip.plugin_api.hooks import hookimpl
from anychip.plugin_api.linear import ActFormat, LinearKernel, LinearPart, LinearSpec, WeightView
from anychip.plugin_api.manifest import (
    CommandManifest,
    Decision,
    DeviceInfo,
    ModelManifest,
    ParserManifest,
    Placement,
    PlatformManifest,
    PluginOptions,
    PolicyManifest,
    ProbeResult,
    ProposerManifest,
    Requirement,
)
from anychip.plugin_api.memory import MemoryInfo, PeakMemory, WeightsKey
from anychip.plugin_api.moe import Activation, ExpertParallel, FusedMoE, MoESpec, Routing
from anychip.plugin_api.ops import OP_VERSIONS, Ops, QKNorm, Rope, op_override
from anychip.plugin_api.plan import BatchView, Recorder
from anychip.plugin_api.platform import Event, Platform, PlatformContext, ReferenceKernels
from anychip.plugin_api.profile import DeviceProfile, DeviceSpan
from anychip.plugin_api.quantization import FP8_MAX, INT4_ZERO, SCHEMES, QuantScheme
from anychip.plugin_api.step import (
    CompileReport,
    ForwardContext,
    KVPlan,
    ModelSource,
    Shard,
    StepModel,
    StepProgram,
    edit_state_bytes,
)
from anychip.plugin_api.step_arrays import Section
from anychip.plugin_api.step_inputs import (
    DRAWN,
    IN_PROMPT,
    NUM_AXES,
    EmbeddingRows,
    EnteringRow,
    SamplingInputs,
    StepInputs,
)
from anychip.plugin_api.step_outputs import HostOutputs, ReadyOutputs, Scores, StepOutputs
from anychip.plugin_api.version import API_VERSION
from anychip.types import MAX_BIASES, MAX_LOGPROBS, NULL_BLOCK, PADDING_SLOT

__all__ = [
    "API_VERSION", "DRAFTS", "DRAWN", "EDITS", "EMBEDDINGS", "FINAL", "FP8_MAX", "INT4_ZERO", "IN_PROMPT", "LOGPROBS",
    "MASKS", "MAX_BIASES", "MAX_LOGPROBS", "MROPE", "NULL_BLOCK", "NUM_AXES", "OP_VERSIONS", "PADDING_SLOT", "POOLED",
    "SCHEMES", "SCORES", "TAPS", "ActFormat", "Activation", "AttentionBackend", "AttentionLayer", "AttentionSpec",
    "BatchView", "Capabilities", "CommandManifest", "Communicator", "CompileReport", "Decision", "DeviceFault",
    "DeviceInfo", "DeviceProfile", "DeviceSpan", "EagerCall", "EmbeddingRows", "EngineConfig", "EnteringRow", "Event",
    "ExpertParallel", "ForwardContext", "ForwardExtras", "FusedMoE", "GraphCapture", "GraphLevel", "GroupSpec",
    "HostOutputs", "KVLayout", "KVPlan", "LinearKernel", "LinearPart", "LinearSpec", "MemoryInfo", "MoESpec",
    "ModelManifest", "ModelSource", "Ops", "ParserManifest", "PartialAttention", "PeakMemory", "Placement",
    "PlannedCall", "Platform", "PlatformContext", "PlatformManifest", "PluginOptions", "PolicyManifest",
    "ProbeResult", "ProposerManifest", "QKNorm", "QuantScheme", "ReadyOutputs", "Recorder", "ReferenceKernels",
    "RegionCompiler", "Requirement", "Rope", "Routing", "RunOutsideGraph", "SamplingInputs", "Scores", "Section",
    "ShapeKey", "ShapePolicy", "Shard", "StepInputs", "StepLimits", "StepModel", "StepOutputs", "StepProgram",
    "StepRules", "Turning", "Unsupported", "WeightView", "WeightsKey", "dense_page_bytes", "edit_state_bytes",
    "forward_features", "hookimpl", "op_override", "sampling_features",
]  # fmt: skip
