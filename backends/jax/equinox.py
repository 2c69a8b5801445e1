"""SA attention as an Equinox layer, whose own MultiheadAttention does not let its softmax be replaced."""

from typing import Any

import equinox as eqx
import jax

from sa_softmax.backends.jax import sa_attention

__all__ = ["SAMultiheadAttention"]


class SAMultiheadAttention(eqx.nn.MultiheadAttention):
    """``equinox.nn.MultiheadAttention`` with SA attention; parameters and arguments are the same.

    Two more keyword arguments of the constructor, ``variant`` ("normalized") and ``implementation`` (None), are those
    of ``sa_attention``. ``dropout_p`` must be 0 where the layer is trained.
    """

    variant: str = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self, *args: Any, variant: str = "normalized", implementation: str | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.variant = variant
        self.implementation = implementation

    def __call__(
        self,
        query: jax.Array,
        key_: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads: Any = None,
    ) -> jax.Array:
        """Attention of query (Tq, query_size) over key_ (Tk, key_size) and value (Tk, value_size): (Tq, output_size).

        ``mask`` is boolean, (Tq, Tk) or (num_heads, Tq, Tk), True where a key participates. ``process_heads`` maps the
        heads (T, num_heads, size) of query, key and value to heads of the same shapes. ``key`` would drive dropout.
        ``deterministic`` is Equinox's older name of ``inference``.

        Raises:
            NotImplementedError: dropout, unless ``inference``.
            ValueError, TypeError: shapes or dtypes that do not fit, heads that change shape.
        """
        inference = deterministic if inference is None else inference
        inference = self.dropout.inference if inference is None else inference
        if self.dropout.p > 0 and not inference:
            raise NotImplementedError(
                f"SA attention computes no weights that dropout could act on; got dropout_p={self.dropout.p}. "
                "Construct the layer with dropout_p=0 and put a Dropout after it, or call it with inference=True"
            )
        heads = tuple(
            jax.vmap(project)(x).reshape(x.shape[0], self.num_heads, -1)
            for project, x in ((self.query_proj, query), (self.key_proj, key_), (self.value_proj, value))
        )
        if process_heads is not None:
            shapes = [x.shape for x in heads]
            heads = process_heads(*heads)
            if [x.shape for x in heads] != shapes:
                raise ValueError(
                    f"process_heads must keep the shapes of the heads, {shapes}; got {[x.shape for x in heads]}"
                )
        o = sa_attention(
            *(x.swapaxes(0, 1) for x in heads), variant=self.variant, mask=mask, implementation=self.implementation
        )
        return jax.vmap(self.output_proj)(o.swapaxes(0, 1).reshape(query.shape[0], -1))
