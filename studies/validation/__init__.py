"""How often the verdict is right: docs/validation.md, from trainings and simulations."""
