/* Every op's cpu.c, compiled for one instruction set. The including file defines VARIANT and
   VECTOR_BYTES and selects the target. */

#include "groups.h"
#include "tile.h"
#include "vector.h"

#include "../activation/cpu.c"
#include "../adamw/cpu.c"
#include "../dropout/cpu.c"
#include "../embedding/cpu.c"
#include "../grad_norm/cpu.c"
#include "../layernorm/cpu.c"
#include "../matmul/cpu.c"
#include "../residual/cpu.c"
#include "../rmsnorm/cpu.c"
#include "../rope/cpu.c"
#include "../softmax_xent/cpu.c"

#include "../attention/cpu.c" /* uses the dropout above */
#include "../lstm/cpu.c"      /* uses the products above */

#define ATTENTION_ARGUMENTS "hhhq?qU?u?iiiiiiiiiddd"

const Kernel VARIANT[] = {
    {"add", "ffFi", add},
    {"adamw", "FfFFiddddddd", adamw},
    {"attention_backward", ATTENTION_ARGUMENTS "hhfHHH", attention_backward},
    {"attention_forward", ATTENTION_ARGUMENTS "HF", attention_forward},
    {"column_sum", "fFii", column_sum},
    {"dropout", "fFUuiiid", dropout},
    {"embedding_backward", "fqFiiiii", embedding_backward},
    {"embedding_forward", "qfFiiii", embedding_forward},
    {"geglu_backward", "ffFii", geglu_backward},
    {"geglu_forward", "fFii", geglu_forward},
    {"gelu_erf_backward", "ffFi", gelu_erf_backward},
    {"gelu_erf_forward", "fFi", gelu_erf_forward},
    {"gelu_tanh_backward", "ffFi", gelu_tanh_backward},
    {"gelu_tanh_forward", "fFi", gelu_tanh_forward},
    {"layernorm_backward", "ff?ffffF?F?ii", layernorm_backward},
    {"layernorm_forward", "ff?f?ff?F?FFFiid", layernorm_forward},
    {"lstm_backward", "FfffFii", lstm_backward},
    {"lstm_forward", "FfFFii", lstm_forward},
    {"lstm_window_backward", "FffFFiii", lstm_window_backward},
    {"lstm_window_forward", "FfFiii", lstm_window_forward},
    {"matmul", "mmMf?F?F?iiiii", matmul},
    {"pack_matrix", "mFii", pack_matrix},
    {"relu2_backward", "ffFi", relu2_backward},
    {"relu2_forward", "fFi", relu2_forward},
    {"relu_backward", "ffFi", relu_backward},
    {"relu_forward", "fFi", relu_forward},
    {"rmsnorm_backward", "ff?fffF?F?ii", rmsnorm_backward},
    {"rmsnorm_forward", "ff?f?fF?FFiid", rmsnorm_forward},
    {"rope", "Hffiiiii", rope},
    {"sgd", "Ffid", sgd},
    {"silu_backward", "ffFi", silu_backward},
    {"silu_forward", "fFi", silu_forward},
    {"sum_arrays", "UFDii", sum_arrays},
    {"sum_of_squares", "fDi", sum_of_squares},
    {"swiglu_backward", "ffFii", swiglu_backward},
    {"swiglu_forward", "fFii", swiglu_forward},
    {"xent_grad", "Fffqiii", xent_grad},
    {"xent_max", "fFiii", xent_max},
    {"xent_shifted_sum", "FfqFFiiii", xent_shifted_sum},
    {NULL, NULL, NULL},
};
