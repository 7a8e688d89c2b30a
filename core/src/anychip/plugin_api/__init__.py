"""The vendor's whole world: what a plugin implements and what it may import. Importing it needs no torch.

Start at PlatformManifest and Platform; docs/writing-a-plugin.md walks through them.
"""

from anychip.config import EngineConfig
from anychip.errors import DeviceFault, Unsupported
from anychip.plugin_api.adapters import (
    NO_ADAPTER,
    AdaptedPart,
    AdapterEntry,
    AdapterSite,
    AdapterStack,
    LowRank,
    StepAdapters,
    sites_of,
)
from anychip.plugin_api.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    KVLayout,
    PartialAttention,
    dense_page_bytes,
)
from anychip.plugin_api.cache import CacheBackend, CanonicalArray, plain_bytes
from anychip.plugin_api.cache_plan import KVPlan
from anychip.plugin_api.cache_specs import CacheSpec, PagedBackend, PagedSpec
from anychip.plugin_api.capabilities import Capabilities, GraphLevel, StepLimits, StepRules
from anychip.plugin_api.communicator import MAX_SENT, Communicator, GroupSpec
from anychip.plugin_api.encoder import EncoderBackend, EncoderLayer, EncoderSpec, EncoderView
from anychip.plugin_api.event import Event
from anychip.plugin_api.forward_context import ForwardContext
from anychip.plugin_api.forward_extras import FINAL, ForwardExtras, Turning
from anychip.plugin_api.graph import (
    ADAPTERS,
    DRAFTS,
    EDITS,
    EMBEDDINGS,
    LOGPROBS,
    MASKS,
    MROPE,
    POOLED,
    SCORES,
    SEGMENTS,
    TAPS,
    CapturedShapes,
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
from anychip.plugin_api.latent import IndexInputs, LatentBackend, LatentLayer, LatentSpec, latent_page_bytes
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
    QuantFormatManifest,
    Requirement,
    Topology,
)
from anychip.plugin_api.memory import MemoryInfo, PeakMemory, WeightsKey
from anychip.plugin_api.mesh import AXES, Axis, Mesh, MeshShape
from anychip.plugin_api.moe import Activation, Dispatched, ExpertParallel, FusedMoE, MoESpec, Routing
from anychip.plugin_api.ops import OP_VERSIONS, Ops, QKNorm, Rope, op_override
from anychip.plugin_api.plan import BatchView, Recorder
from anychip.plugin_api.platform import Platform, PlatformContext, ReferenceKernels
from anychip.plugin_api.profile import DeviceProfile, DeviceSpan
from anychip.plugin_api.quantization import (
    FP8_MAX,
    INT4_ZERO,
    NAMED,
    SCALES,
    SCHEMES,
    VALUES,
    QuantScheme,
    implied_zero,
)
from anychip.plugin_api.recurrences import RECURRENCES, Recurrence
from anychip.plugin_api.sharding import KV_HEADS, REPLICATED, HeldTensor, Placed, Sharded, Span, held
from anychip.plugin_api.state import StateBackend, StateLayer, StateSpec, StateView, state_spec
from anychip.plugin_api.step import (
    CompileReport,
    ModelSource,
    StepModel,
    StepProgram,
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
    edit_state_bytes,
)
from anychip.plugin_api.step_outputs import HostOutputs, ReadyOutputs, Scores, StepOutputs
from anychip.plugin_api.version import API_VERSION
from anychip.types import MAX_BIASES, MAX_LOGPROBS, NULL_BLOCK, PADDING_SLOT

__all__ = [
    "ADAPTERS", "API_VERSION", "AXES", "DRAFTS", "DRAWN", "EDITS", "EMBEDDINGS", "FINAL", "FP8_MAX", "INT4_ZERO",
    "IN_PROMPT", "KV_HEADS", "LOGPROBS", "MASKS", "MAX_BIASES", "MAX_LOGPROBS", "MAX_SENT", "MROPE", "NAMED",
    "NO_ADAPTER", "NULL_BLOCK", "NUM_AXES", "OP_VERSIONS", "PADDING_SLOT", "POOLED", "RECURRENCES", "REPLICATED",
    "SCALES", "SCHEMES", "SCORES", "SEGMENTS", "TAPS", "VALUES", "ActFormat", "Activation", "AdaptedPart",
    "AdapterEntry", "AdapterSite", "AdapterStack", "AttentionBackend", "AttentionLayer", "AttentionSpec", "Axis",
    "BatchView", "CacheBackend", "CacheSpec", "CanonicalArray", "Capabilities", "CapturedShapes", "CommandManifest",
    "Communicator", "CompileReport", "Decision", "DeviceFault", "DeviceInfo", "DeviceProfile", "DeviceSpan",
    "Dispatched", "EagerCall", "EmbeddingRows", "EncoderBackend", "EncoderLayer", "EncoderSpec", "EncoderView",
    "EngineConfig", "EnteringRow", "Event", "ExpertParallel", "ForwardContext", "ForwardExtras", "FusedMoE",
    "GraphCapture", "GraphLevel", "GroupSpec", "HeldTensor", "HostOutputs", "IndexInputs", "KVLayout", "KVPlan",
    "LatentBackend", "LatentLayer", "LatentSpec", "LinearKernel", "LinearPart", "LinearSpec", "LowRank", "MemoryInfo",
    "Mesh", "MeshShape", "MoESpec", "ModelManifest", "ModelSource", "Ops", "PagedBackend", "PagedSpec",
    "ParserManifest", "PartialAttention", "PeakMemory", "Placed", "Placement", "PlannedCall", "Platform",
    "PlatformContext", "PlatformManifest", "PluginOptions", "PolicyManifest", "ProbeResult", "ProposerManifest",
    "QKNorm", "QuantFormatManifest", "QuantScheme", "ReadyOutputs", "Recorder", "Recurrence", "ReferenceKernels",
    "RegionCompiler", "Requirement", "Rope", "Routing", "RunOutsideGraph", "SamplingInputs", "Scores", "Section",
    "ShapeKey", "ShapePolicy", "Sharded", "Span", "StateBackend", "StateLayer", "StateSpec", "StateView",
    "StepAdapters", "StepInputs", "StepLimits", "StepModel", "StepOutputs", "StepProgram", "StepRules", "Topology",
    "Turning", "Unsupported", "WeightView", "WeightsKey", "dense_page_bytes", "edit_state_bytes", "forward_features",
    "held", "hookimpl", "implied_zero", "latent_page_bytes", "op_override", "plain_bytes", "sampling_features",
    "sites_of", "state_spec",
]  # fmt: skip
