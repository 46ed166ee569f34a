"""The columns of a table of solver steps; see `solver`."""

COLUMNS = (
    "d_s",  # D: factor of the two below together
    "d_x",  # D: weight of the sample
    "d_p",  # D: weight of the prediction
    "d_q",  # D: what d_p loses when it becomes float32
    "c_x",  # weight of the sample
    "c_p",  # weight of the prediction
    "k_d",  # weight of D
    "k_p",  # weight of the previous D
    "k_n",  # weight of fresh noise
)
INDEX = {name: i for i, name in enumerate(COLUMNS)}
