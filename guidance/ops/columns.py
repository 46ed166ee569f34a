"""The columns of a table of solver steps; see `solver`."""

COLUMNS = (
    "k_p",  # weight of the previous D
    "c_x",  # weight of the sample, D expressed by sample and prediction
    "c_p",  # weight of the prediction
    "d_x",  # D: weight of the sample
    "d_p",  # D: weight of the prediction
    "k_a",  # weight of a change of D under which the noise keeps its direction (clipping)
    "k_n",  # weight of fresh noise
)
INDEX = {name: i for i, name in enumerate(COLUMNS)}
