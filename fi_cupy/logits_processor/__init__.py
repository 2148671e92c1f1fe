"""Pipelines from logits to tokens: temperature, softmax, top-k, top-p, min-p and the draw, fused into one kernel."""

from __future__ import annotations

from fi_cupy.logits_processor.compiler import CompileError as CompileError
from fi_cupy.logits_processor.compiler import Compiler as Compiler
from fi_cupy.logits_processor.compiler import FusionRule as FusionRule
from fi_cupy.logits_processor.compiler import compile_pipeline as compile_pipeline
from fi_cupy.logits_processor.pipeline import LogitsPipe as LogitsPipe
from fi_cupy.logits_processor.processors import LegalizationError as LegalizationError
from fi_cupy.logits_processor.processors import LogitsProcessor as LogitsProcessor
from fi_cupy.logits_processor.processors import MinP as MinP
from fi_cupy.logits_processor.processors import Sample as Sample
from fi_cupy.logits_processor.processors import Softmax as Softmax
from fi_cupy.logits_processor.processors import Temperature as Temperature
from fi_cupy.logits_processor.processors import TopK as TopK
from fi_cupy.logits_processor.processors import TopP as TopP
from fi_cupy.logits_processor.processors import legalize_processors as legalize_processors
from fi_cupy.logits_processor.types import Op as Op
from fi_cupy.logits_processor.types import ParameterizedOp as ParameterizedOp
from fi_cupy.logits_processor.types import TaggedTensor as TaggedTensor
from fi_cupy.logits_processor.types import TensorType as TensorType
