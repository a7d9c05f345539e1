/* Activations in plain C, which the compiler turns into vectors of the instruction set of the file that includes this. */
#ifndef MOEC_ACTIVATE_H
#define MOEC_ACTIVATE_H

#include "exponential.h"
#include "kernels.h"

static inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

static void activate(const Activation *a, const float *x, int width, float *y) {
  float alpha = a->alpha, beta = a->beta, limit = a->limit;
  switch (a->function) {
    case SWIGLU:
      for (int i = 0; i < width; i++) {
        float g = fminf(x[2 * i], limit), u = fmaxf(fminf(x[2 * i + 1], limit), -limit);
        y[i] = g * sigmoid(alpha * g) * (u + beta);
      }
      break;
    case SILU:
      for (int i = 0; i < width; i++) y[i] = x[i] * sigmoid(x[i]);
      break;
    case GELU_TANH: /* 0.5 x (1 + tanh(z)) = x sigmoid(2 z) */
      for (int i = 0; i < width; i++) {
        y[i] = x[i] * sigmoid(1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
      }
      break;
    case RELU:
      for (int i = 0; i < width; i++) y[i] = fmaxf(x[i], 0);
      break;
    case IDENTITY:
      memcpy(y, x, (size_t)width * sizeof(float));
  }
}

#endif
