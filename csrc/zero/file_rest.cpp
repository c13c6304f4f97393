// SPDX-License-Identifier: Apache-2.0
#include "zero/file_rest.h"

#include <ATen/ops/from_blob.h>

#include <vector>

#include "base/error.h"
#include "platform/memory.h"

namespace ds::zero {

at::Tensor FileRest::zeros(int64_t numel, at::ScalarType dtype, bool second_place) {
  if (in_memory_.take(numel)) return memory_.zeros(numel, dtype);
  std::shared_ptr<void> range = file_->allocate(numel * static_cast<int64_t>(c10::elementSize(dtype)), second_place && second_places_);
  void* data = range.get();
  return at::from_blob(data, {numel}, [range](void*) {}, at::TensorOptions().dtype(dtype));
}

void FileRest::expect(const at::Tensor& t) {
  if (in_file(t)) platform::prefetch_pages(t.data_ptr(), t.nbytes());
}

void FileRest::leave(const at::Tensor& t) {
  if (in_file(t)) file_->leave(t.data_ptr(), static_cast<int64_t>(t.nbytes()));
}

void FileRest::stream(const std::vector<Job>& jobs, const Work& work, Into into) {
  std::vector<offload::StreamJob> list;
  for (const Job& job : jobs) {
    offload::StreamJob entry;
    entry.numel = job.arrays.front().numel();
    for (size_t i = 0; i < job.arrays.size(); ++i) {
      const at::Tensor& t = job.arrays[i];
      const auto offset = file_->offset_of(t.data_ptr());
      DS_CHECK(offset && t.is_contiguous() && t.numel() == entry.numel, "an array to stream must lie whole in the file");
      // Pages in use through the mapping would be dropped from the cache one by one, in the midst of the transfer.
      file_->leave(t.data_ptr(), static_cast<int64_t>(t.nbytes()));
      entry.arrays.push_back({*offset, static_cast<int64_t>(t.element_size()), job.write[i]});
      if (into == Into::Second && job.write[i]) {
        const auto second = file_->second_place_of(t.data_ptr());
        DS_CHECK(second, "an array to stream into its second place has none");
        entry.arrays.back().written_to = *second;
      }
    }
    list.push_back(std::move(entry));
  }
  std::vector<at::Tensor> tile;
  stream_.run(file_->file(), list, [&](size_t j, int64_t begin, int64_t numel, void* const* data) {
    tile.clear();
    for (size_t i = 0; i < jobs[j].arrays.size(); ++i) {
      tile.push_back(at::from_blob(data[i], {numel}, at::TensorOptions().dtype(jobs[j].arrays[i].scalar_type())));
    }
    work(j, begin, tile);
  });
}

}  // namespace ds::zero
