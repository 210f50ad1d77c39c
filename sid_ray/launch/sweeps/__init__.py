"""Sweeps: many distillations by Ray Tune, to find the settings that suit a teacher."""
