// SPDX-License-Identifier: Apache-2.0
// CUDA twins of optim.h: the updates of element.h, four consecutive elements a thread. Element.h rounds every operation
// on its own, so the device writes the bits of the CPU.
#include "kernels/launch.cuh"
#include "kernels/optim/element.h"
#include "kernels/reduce/reduce.h"

namespace ds::kernels {
namespace {

using namespace cuda;

struct AdamUpdate {
  static constexpr int kStates = 2;
  AdamConstants c;
  __device__ __forceinline__ void operator()(float g, float& p, float& m, float& v) const { c(g, p, m, v); }
};
// Updates with one state.
template <class Constants>
struct OneState {
  static constexpr int kStates = 1;
  Constants c;
  __device__ __forceinline__ void operator()(float g, float& p, float& s, float&) const { c(g, p, s); }
};
struct PlainSgd {
  static constexpr int kStates = 0;
  SgdConstants c;
  __device__ __forceinline__ void operator()(float g, float& p, float& s, float&) const { c(g, p, s); }
};
struct LambApply {
  static constexpr int kStates = 0;
  __device__ __forceinline__ void operator()(float g, float& p, float&, float&) const { p = sub(p, g); }
};

template <class Update, class G, class Low>
__device__ __forceinline__ void update_group(const Update& update, float grad_scale, float* p, const typename G::Raw* g, float* s0, float* s1,
                                             typename Low::Raw* low, int64_t n, bool is_aligned) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread;
  if (i >= n) return;
  const Group at = group_at(i, n, is_aligned);
  float grad[kPerThread], param[kPerThread], first[kPerThread] = {}, second[kPerThread] = {};
  if (Update::kStates > 1) load(F32{}, s1, at, second);
  if (Update::kStates > 0) load(F32{}, s0, at, first);
  load(F32{}, p, at, param);
  load(G{}, g, at, grad);  // the one that is converted comes last
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) update(mul(grad[k], grad_scale), param[k], first[k], second[k]);
  store(F32{}, param, p, at);
  if (Update::kStates > 0) store(F32{}, first, s0, at);
  if (Update::kStates > 1) store(F32{}, second, s1, at);
  store(Low{}, param, low, at);
}

template <class Update, class G, class Low>
__global__ void __launch_bounds__(kThreads)
    update_kernel(Update update, float grad_scale, float* p, const typename G::Raw* g, float* s0, float* s1,
                  typename Low::Raw* low, int64_t n, bool is_aligned) {
  update_group<Update, G, Low>(update, grad_scale, p, g, s0, s1, low, n, is_aligned);
}

template <class Low>
__global__ void __launch_bounds__(kThreads)
    lamb_apply_kernel(LambScale scale, const double* norms, double* ratio, float* p, const float* u, typename Low::Raw* low, int64_t n,
                      bool is_aligned) {
  const double found = trust_ratio(norms, scale);
  if (blockIdx.x == 0 && threadIdx.x == 0) *ratio = found;
  update_group<LambApply, F32, Low>(LambApply{}, static_cast<float>(scale.lr * found), p, u, nullptr, nullptr, low, n, is_aligned);
}

template <class Update>
void update_slice(const char* name, const Update& update, float grad_scale, float* p, const void* g, DType g_dt,
                  float* s0, float* s1, void* low, DType low_dt, int64_t n, cudaStream_t stream) {
  dispatch_float(g_dt, "g", [&](auto in) {
    dispatch_optional(low, low_dt, "low", [&](auto out) {
      using G = decltype(in);
      using Low = decltype(out);
      if (n == 0) return;
      launch(name, update_kernel<Update, G, Low>, blocks_for(n), stream, update, grad_scale, p,
             static_cast<const typename G::Raw*>(g), s0, s1, static_cast<typename Low::Raw*>(low), n,
             aligned({p, g, s0, s1, low}));
    });
  });
}

template <class G>
__global__ void __launch_bounds__(kThreads)
    lamb_kernel(LambConstants direction, float grad_scale, const float* p, const typename G::Raw* g, float* m, float* v,
                float* u, int64_t n, bool is_aligned, Partials* partials) {
  double p_squares = 0.0, u_squares = 0.0;
  const int64_t stride = int64_t{gridDim.x} * kThreads * kPerThread;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread; i < n; i += stride) {
    const Group at = group_at(i, n, is_aligned);
    float grad[kPerThread], param[kPerThread], first[kPerThread], second[kPerThread], update[kPerThread];
    load(F32{}, p, at, param);
    load(F32{}, m, at, first);
    load(F32{}, v, at, second);
    load(G{}, g, at, grad);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      update[k] = direction(mul(grad[k], grad_scale), param[k], first[k], second[k]);
      if (k < at.count) {
        p_squares += double{param[k]} * double{param[k]};
        u_squares += double{update[k]} * double{update[k]};
      }
    }
    store(F32{}, first, m, at);
    store(F32{}, second, v, at);
    store(F32{}, update, u, at);
  }
  leave_partials(p_squares, u_squares, partials);
}

}  // namespace

void adam(const Adam& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, float* v, void* low,
          DType low_dt, int64_t n, cudaStream_t stream) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {m, "m"}, {v, "v"}});
  update_slice("adam", AdamUpdate{AdamConstants(h)}, grad_scale, p, g, g_dt, m, v, low, low_dt, n, stream);
}

void lion(const Lion& h, float grad_scale, float* p, const void* g, DType g_dt, float* m, void* low, DType low_dt,
          int64_t n, cudaStream_t stream) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {m, "m"}});
  const OneState<LionConstants> update{LionConstants(h)};
  update_slice("lion", update, grad_scale, p, g, g_dt, m, nullptr, low, low_dt, n, stream);
}

void adagrad(const Adagrad& h, float grad_scale, float* p, const void* g, DType g_dt, float* sum, void* low,
             DType low_dt, int64_t n, cudaStream_t stream) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {sum, "sum"}});
  const OneState<AdagradConstants> update{AdagradConstants(h)};
  update_slice("adagrad", update, grad_scale, p, g, g_dt, sum, nullptr, low, low_dt, n, stream);
}

void sgd(const Sgd& h, float grad_scale, float* p, const void* g, DType g_dt, float* buf, void* low, DType low_dt,
         int64_t n, cudaStream_t stream) {
  check_arrays(n, {{p, "p"}, {g, "g"}});
  if (h.momentum == 0.0) {
    const PlainSgd update{SgdConstants(h)};
    return update_slice("sgd", update, grad_scale, p, g, g_dt, nullptr, nullptr, low, low_dt, n, stream);
  }
  check_arrays(n, {{buf, "buf"}});
  const OneState<SgdConstants> update{SgdConstants(h)};
  update_slice("sgd", update, grad_scale, p, g, g_dt, buf, nullptr, low, low_dt, n, stream);
}

void lamb_direction(const Lamb& h, float grad_scale, const float* p, const void* g, DType g_dt, float* m, float* v,
                    float* u, int64_t n, double* norms, void* workspace, cudaStream_t stream) {
  check_arrays(n, {{p, "p"}, {g, "g"}, {m, "m"}, {v, "v"}, {u, "u"}});
  DS_CHECK_VALUE(norms != nullptr, "norms is null");
  DS_CHECK_VALUE(workspace != nullptr, "workspace is null");
  auto* partials = static_cast<Partials*>(workspace);
  const int64_t blocks = partial_blocks(n);
  dispatch_float(g_dt, "g", [&](auto in) {
    using G = decltype(in);
    launch("lamb_direction", lamb_kernel<G>, blocks, stream, LambConstants(h), grad_scale, p,
           static_cast<const typename G::Raw*>(g), m, v, u, n, aligned({p, g, m, v, u}), partials);
    launch("lamb_direction", join_partials, 1, stream, partials, static_cast<int>(blocks), true, norms);
  });
}

void lamb_apply(float lr_times_ratio, float* p, const float* u, void* low, DType low_dt, int64_t n,
                cudaStream_t stream) {
  check_arrays(n, {{p, "p"}, {u, "u"}});
  update_slice("lamb_apply", LambApply{}, lr_times_ratio, p, u, DType::F32, nullptr, nullptr, low, low_dt, n, stream);
}

void lamb_apply(const LambScale& scale, const double* norms, double* ratio, float* p, const float* u, void* low, DType low_dt, int64_t n,
                cudaStream_t stream) {
  check_arrays(n, {{p, "p"}, {u, "u"}});
  DS_CHECK_VALUE(norms != nullptr, "norms is null");
  DS_CHECK_VALUE(ratio != nullptr, "ratio is null");
  dispatch_optional(low, low_dt, "low", [&](auto out) {
    using Low = decltype(out);
    const int64_t blocks = std::max<int64_t>(1, blocks_for(n));  // somebody writes the ratio
    launch("lamb_apply", lamb_apply_kernel<Low>, blocks, stream, scale, norms, ratio, p, u, static_cast<typename Low::Raw*>(low), n,
           aligned({p, u, low}));
  });
}

}  // namespace ds::kernels
