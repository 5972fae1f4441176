"""Train an adapter over a base that is sharded over the processes; run with torchrun, one process a device.

torchrun --nproc-per-node 2 train_sharded.py adapter.safetensors
"""

import os
import sys

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh

import lora_lite as ll

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())

# Every process makes the model with the same weights, on the CPU; with from_pretrained they share the pages of the file.
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
model = transformers.LlamaForCausalLM(config)

adapt = ll.build(model, ll.LoRAConfig(r=4), remat=r"layers\.\d+$").train()
adapt = adapt.shard(init_device_mesh(device, (processes,)))
del model  # from here on each process holds its part

params = adapt.init(seed=0)  # the same in every process, since the seed is
leaves = ll.tree_leaves(params)
optimizer = torch.optim.AdamW(leaves, lr=1e-2)
step = ll.value_and_grad(lambda params, batch: adapt(params, batch).loss)

tokens = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(1))
rows = tokens[rank::processes].to(leaves[0].device)  # of equal number in each process, so that the mean of means is the mean
for _ in range(10):
    value, grads = ll.all_reduce_mean(step(params, {"input_ids": rows, "labels": rows}))
    ll.set_grads(params, grads)
    optimizer.step()

if rank == 0:
    ll.save(adapt, params, sys.argv[1])
    print(f"loss {float(value):.4f}")
dist.barrier()
dist.destroy_process_group()
# gloo's threads may still hold tensors, and would abort the process while the interpreter takes itself apart (pytorch/pytorch#179291).
sys.stdout.flush()
os._exit(0)
