"""The form of stored activations: how float rows become the bytes of a shard's file, and float rows again.

float rows [T, D] ──form──▶ stored rows [T, C] ──packing──▶ a shard's file, block by block

form.py      which forms there are, and what each can do
floats.py    values rounded to bf16, fp16 or fp32
int8.py      values as 8-bit codes, by a calibration of the site and a scale of the row
decoding.py  codes → values on a CPU, compiled
packing.py   blocks of stored rows, raw or compressed, in a file that Zarr reads

A form is lossy or not; a packing never is. All else in saemill sees float rows, and blocks of stored rows.
"""
