"""Write one adapter file of each variant, the model that they stand on, and what it gives: run with version 0.1.0 at 212032e.

The files are kept as that version wrote them; `tests/test_old_files.py` loads them with the present one.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import lora_lite as ll

HERE = Path(__file__).parent

CONFIGS = {
    "lora": ll.LoRAConfig(r=3, alpha=5.0, rslora=True, dropout=0.1, target_names=r"blocks", layers=(0, 1)),
    "pissa": ll.PiSSAConfig(r=3),
    "dora": ll.DoRAConfig(r=3),
    "ia3": ll.IA3Config(),
    "ia3_ff": ll.IA3FFConfig(),
    "delora": ll.DeLoRAConfig(r=3, init="copy"),
    "delora-zeros": ll.DeLoRAConfig(r=3),
    "hra": ll.HRAConfig(r=4),
    "road": ll.ROADConfig(variant="road_2", group_size=8),
    "oft": ll.OFTConfig(block_size=8),
    "lora_xs": ll.LoRAXSConfig(r=4, init="zeros"),
    "antipasto": ll.AntiPaSTOConfig(r=8),
    "antipasto-dplr": ll.AntiPaSTOConfig(r=8, core="dplr", basis="wanda", k=2),
    "ssvd": ll.SSVDConfig(r=4),
    "bitfit": ll.BitFitConfig(),
    "eva": ll.EVAConfig(r=3, rho=2.0),
    "corda": ll.CorDAConfig(r=3),
    "asvd": ll.ASVDConfig(r=3),
    "loftq": ll.LoftQConfig(r=3),
    "vera": ll.VeRAConfig(r=8),
    "adalora": ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=10),
    "lora_ga": ll.LoRAGAConfig(r=3),
    "loreft": ll.LoReFTConfig(r=3, positions="f1+l2"),
    "ln_tuning": ll.LNTuningConfig(),
    "full": ll.FullConfig(target_names=r"head$"),
    "lora-kinds": ll.LoRAConfig(r=2, target_names=(r"embed$", r"conv$", r"in_proj_weight$", r"out_proj$"), exclude_names=()),
}


class Model(nn.Module):
    """Something of every sort that a variant may adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 24)
        self.conv = nn.Conv1d(24, 24, 3, padding=1)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24, bias=False), nn.LayerNorm(24)) for _ in range(2)
        )
        self.head = nn.Linear(24, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def main() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    ids = torch.randint(0, 16, (3, 5))
    outputs = {"ids": ids, "base": model(ids).detach()}
    for name, cfg in CONFIGS.items():
        if not cfg.target_names:
            cfg = dataclasses.replace(cfg, exclude_names=("attention",))
        given = {"calibration": [ids, ids.flip(0) + 0]} if cfg.calibrated else {}
        if cfg.name == "lora_ga":
            given["loss"] = lambda output, batch: output.square().mean()
        if cfg.original:
            given["original"] = {n: t + 0.01 * torch.randn_like(t) for n, t in model.state_dict().items()}
        adapt = ll.build(model, cfg, **given)
        params = ll.tree_map(lambda p: p + 0.1 * torch.randn_like(p), adapt.init(seed=1))
        ll.save(adapt, params, HERE / f"{name}.safetensors")
        outputs[name] = adapt(params, ids).detach()
    save_file({k: v.contiguous() for k, v in outputs.items()}, HERE / "outputs.safetensors")
    save_file(model.state_dict(), HERE / "model.safetensors")


if __name__ == "__main__":
    sys.exit(main())
