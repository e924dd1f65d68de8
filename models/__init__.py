"""The networks and nothing else. This package imports torch, einops, numpy and itself.

fsq                   finite scalar quantization: a codebook that is a grid
patch_embed           frames ↔ patches
st_transformer        the spatio-temporal transformer under all three models
video_tokenizer       stage 1: frames ↔ discrete tokens
latent_action_model   stage 2: which action lies between two frames
dynamics              stage 3: the tokens of the next frame (next_latent: a simpler variant)
world_model           the three together: reset(frames), step(action) → frame
distributed           what a loss needs to know of other processes
"""
