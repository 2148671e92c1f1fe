// The Hopper kernel with a user's variant (VariantLogits). Queries and keys cannot be transformed there: the copy engine
// brings them and the tensor cores read them without a thread in between.
#pragma once
#include "attention/prefill_hopper.cuh"
#include "attention/prefill_variant.cuh"
