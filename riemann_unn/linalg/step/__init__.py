"""The kernels of a step: tangent directions, the φ of a small core, the update, the polish."""
