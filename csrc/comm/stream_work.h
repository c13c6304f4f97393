// SPDX-License-Identifier: Apache-2.0
// Work on a stream of a transport's own; see Note [Streams] in nccl_transport.cpp. Streams and events are c10's device-generic ones.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <memory>
#include <utility>

#include "comm/transport.h"

namespace ds::comm {

inline c10::Stream current_stream(at::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

// Complete when `reached` was passed on the communication stream. Keeps alive what the stream reads.
class StreamWork : public ReduceWork {
 public:
  StreamWork(at::Device device, std::shared_ptr<SymmetricBuffer> source)
      : device_(device), source_(std::move(source)), read_(device.type()), reached_(device.type()) {}
  ~StreamWork() override {
    if (!waited_) {
      try {
        reached_.block(current_stream(device_));
      } catch (...) {  // the driver is shutting down: nothing can be reused any more
      }
    }
  }
  bool test() override { return reached_.query(); }
  void wait() override {
    reached_.block(current_stream(device_));
    waited_ = true;
  }
  bool drained() override { return read_.query(); }
  void wait_drained() override { read_.block(current_stream(device_)); }

  void mark_read(const c10::Stream& stream) { read_.record(stream); }        // the source may be overwritten after this
  void mark_reached(const c10::Stream& stream) { reached_.record(stream); }  // everything is done after this

 private:
  at::Device device_;
  std::shared_ptr<SymmetricBuffer> source_;
  c10::Event read_;
  c10::Event reached_;
  bool waited_ = false;
};

// What the caller's current stream holds so far comes before what `stream` is given next.
inline void after_current_stream(const c10::Stream& stream) {
  c10::Event written(stream.device_type());
  written.record(current_stream(stream.device()));
  written.block(stream);
}

}  // namespace ds::comm
