"""RWKV-Infer's mathematics of hxa079, token by token in plain PyTorch, from a `.pth` and what one gives when loading.

Written from the equations of its loader and its forward, not from this package's mixer: heads, sizes, variant, norms
and kept layers are found in the tensors, as there.
"""

import torch
import torch.nn.functional as F


def rms(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x, theta):
    """x (T, heads, N), whole heads, halves turned against each other."""
    T, _, N = x.shape
    angles = torch.arange(T, dtype=x.dtype)[:, None] / theta ** (torch.arange(N // 2, dtype=x.dtype) / (N // 2))
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    left, right = x[..., : N // 2], x[..., N // 2 :]
    return x * cos + torch.cat([-right, left], -1) * sin


class RWKVInfer:
    """What the program loads from a flat state dict.

    Args:
        z: tensors by the names of a `.pth`.
        rope_theta, eps: given at load.
    """

    def __init__(self, z, rope_theta, eps):
        self.z = {name: tensor.double() for name, tensor in z.items()}
        self.theta, self.eps = rope_theta, eps
        self.layers = 1 + max(int(name.split(".")[1]) for name in z if name.startswith("blocks."))
        self.H, self.N = next(tensor.shape for name, tensor in z.items() if ".r_k" in name)
        assert any(".k0" in name for name in z), "no key residual: another architecture"
        width = z["emb.weight"].shape[1]
        assert width % 256 == 0, "gate and up are padded to multiples of 256, their input is not"

    def project(self, prefix, x, names):
        found = []
        for name in names:
            y = x @ self.z[f"{prefix}{name}.weight"].T
            found.append((y + self.z.get(f"{prefix}{name}.bias", 0.0)).view(len(x), -1, self.N))
        q, k, v = found
        if f"{prefix}ln_r.weight" in self.z:
            q, k = rms(q, self.z[f"{prefix}ln_r.weight"], self.eps), rms(k, self.z[f"{prefix}ln_k.weight"], self.eps)
        return q, k, v

    def mixer(self, prefix, x, first):
        z = {name.removeprefix(prefix): t for name, t in self.z.items() if name.startswith(prefix)}
        r, k, v = self.project(prefix, x, ("receptance", "key", "value"))
        r, k = rotate(r, self.theta), rotate(k, self.theta)
        # all five are looked up in every layer, the first one included
        low = {name: x @ z[f"{name}1"] for name in "wavgk"}
        up = {name: z[f"{name}2"] for name in "wavgk"}
        bias = {name: z[f"{name}0"] for name in "wavk"}
        if first is None:
            first = k, v
        else:
            mix = {name: torch.sigmoid(low[name] @ up[name] + bias[name]).view_as(k) for name in "kv"}
            k, v = k + (first[0] - k) * mix["k"], v + (first[1] - v) * mix["v"]
        k, v = (t.repeat_interleave(self.H // t.shape[1], 1) for t in (k, v))
        a = torch.sigmoid(low["a"] @ up["a"] + bias["a"]).view_as(r)
        w = (-F.softplus(-(torch.tanh(low["w"]) @ up["w"] + bias["w"])) - 0.5).view_as(r)
        kk = F.normalize(k, dim=-1)
        k = k * (1 - w + a)
        state, out = torch.zeros(self.H, self.N, self.N, dtype=x.dtype), []
        for t in range(len(x)):
            removed = state @ kk[t].unsqueeze(-1)
            state = state * torch.exp(-torch.exp(w[t])).unsqueeze(1)
            state = state - removed * (kk[t] * a[t]).unsqueeze(1) + v[t].unsqueeze(-1) * k[t].unsqueeze(1)
            out.append((state @ r[t].unsqueeze(-1)).squeeze(-1))
        y = torch.stack(out) * self.N**-0.5 + (r * k * z["r_k"]).sum(-1, keepdim=True) * v
        gate = torch.sigmoid(low["g"]) @ up["g"]
        return (y.flatten(1) * gate) @ z["output.weight"].T, first

    def attention(self, prefix, x):
        q, k, v = self.project(prefix, x, ("q_proj", "k_proj", "v_proj"))  # neither is rotated
        k, v = (t.repeat_interleave(self.H // t.shape[1], 1) for t in (k, v))
        scores = torch.einsum("ihn,jhn->hij", q, k) / self.N**0.5
        scores = scores.masked_fill(torch.ones(len(x), len(x)).tril() == 0, -torch.inf)
        y = torch.einsum("hij,jhn->ihn", scores.softmax(-1), v)
        return y.flatten(1) @ self.z[f"{prefix}o_proj.weight"].T

    @torch.no_grad()
    def logits(self, ids):
        """Logits (T, V) of one row of ids."""
        x, first = self.z["emb.weight"][ids], None
        for i in range(self.layers):
            block = f"blocks.{i}."
            h = rms(x, self.z[f"{block}ln1.weight"], self.eps)
            if f"{block}att.q_proj.weight" in self.z:
                y = self.attention(f"{block}att.", h)
            else:
                y, first = self.mixer(f"{block}att.", h, first)
            x = x + y
            h = rms(x, self.z[f"{block}ln2.weight"], self.eps)
            gate, up, down = (self.z[f"{block}ffn.{name}.weight"] for name in ("gate", "up", "down"))
            x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
        return rms(x, self.z["ln_out.weight"], self.eps) @ self.z["head.weight"].T
