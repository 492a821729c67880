"""Loss scaling, gradient checks and clipping."""
