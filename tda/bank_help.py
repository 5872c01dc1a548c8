"""What a bank is made from, in words, for `tda evaluate bank --help`; imports nothing."""

EXAMPLE = """{
  "model": {"kind": "mlp", "dims": [20, 64, 3], "activation": "relu"},
  "training": {"optimizer": "sgd", "lr": 0.05, "batch": 32, "epochs": 15, "momentum": 0.9},
  "loss": "cross_entropy",
  "measurement": "margin",
  "preprocessing": {"std": 2.0}
}"""

DESCRIPTION = f"""DATA is written by numpy.savez, with the arrays:
  x_train, x_query    numbers, (row, feature) or (row, ...); for a causal_lm token numbers, (row, token), and no y
  y_train, y_query    for cross_entropy classes from 0, (row); for squared_error values, (row) or (row, output)
  recipe              how models are made, trained and measured, a string of JSON
  flipped             may be left out: the training rows known to be bad, booleans or row numbers
Further arrays are copied to the bank.

a recipe, for 20 features and 3 classes:
{EXAMPLE}

its keys; what has a default, which stands first or in brackets, may be left out:
  model           {{"kind": "mlp", "dims": [inputs, widths ..., outputs],
                  "activation": relu, tanh, gelu, sigmoid, silu or identity (of one layer it is identity)}},
                  or {{"kind": "causal_lm", "path": folder beside the file, as save_pretrained leaves it}}
  training        optimizer sgd or adamw, lr, batch (rows), epochs; momentum (0; of sgd), betas ([0.9, 0.999]; of adamw),
                  eps (1e-8; of adamw), weight_decay (0)
  loss            with its measurement of a query:
                  cross_entropy   margin, loss or log_probability
                  squared_error   absolute_error or squared_error
                  causal_lm       loss, margin or log_probability
  preprocessing   scale (1), mean (0), std (1), numbers or one per feature: models see (x * scale - mean) / std
"""
