"""What is measured, one module each: a function from a stage to rows."""
