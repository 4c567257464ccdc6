"""The study's method: activations, directions, interventions, generation, the sweep, edited weights."""
