# SPDX-License-Identifier: Apache-2.0
"""What a trained model attends to and what its embeddings look like (section 4.5).

``attention`` and ``embeddings`` are functions from arrays to arrays; ``figures`` draws
them; ``python -m vit_jax.analysis SOURCE --out=DIR`` does all of it for a checkpoint.
"""
