// The Hopper kernel of latent attention with a user's score and mask functions (VariantLogits).
#pragma once
#include "attention/mla_hopper.cuh"
#include "attention/prefill_variant.cuh"
