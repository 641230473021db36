"""Many GRPO trials in one process, on one frozen base; `trainer` is where to begin to read.

A step goes through `prompts` (what is asked), `generation` or `engine` (what the policies answer), `scoring` with
`objective` (what the answers are worth) and `gradient` with `packing` (what is learnt from them). `stack` holds the
LoRAs of all trials, `state` what each trial has for itself, `checkpoint` both on the disk, `memory` how much is done
at once, and `settings` what can be asked.
"""
