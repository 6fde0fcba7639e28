"""The maths of discrete diffusion: noise, its two kernels, the reverse step, the variational bound, and what no model
can beat."""
