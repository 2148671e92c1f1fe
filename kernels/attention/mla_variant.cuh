// The latent attention kernel with a user's score and mask functions (VariantLogits).
#pragma once
#include "attention/mla.cuh"
#include "attention/prefill_variant.cuh"
