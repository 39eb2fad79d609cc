"""Layers for `kernels.kernelize`: forwards of transformers' Llama and Mistral modules.

Each is a forward that a module of transformers is given in place of its own, hence nothing else:
weights, sizes and settings are that module's. What the kernels do not take runs the module's own
forward, and the reason is logged (see `minitron_kernels.integrations.transformers`).
"""

import functools

from torch import nn

from minitron_kernels.integrations import transformers as calls


class RMSNorm(nn.Module):
    """LlamaRMSNorm, MistralRMSNorm."""

    can_torch_compile = True
    has_backward = False

    def forward(self, hidden_states):
        original = functools.partial(type(self).forward, self)
        return calls.compute_norm(self, hidden_states, original)


class SwiGLUMLP(nn.Module):
    """LlamaMLP, MistralMLP."""

    can_torch_compile = True
    has_backward = False

    def forward(self, x):
        return calls.compute_mlp(self, x, functools.partial(type(self).forward, self))


class MinitronAttention(nn.Module):
    """LlamaAttention, MistralAttention: projections, RoPE, the cache's new rows, attention."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        return calls.compute_attention(
            self,
            hidden_states,
            position_embeddings,
            attention_mask,
            past_key_values,
            kwargs,
            functools.partial(type(self).forward, self),
        )
