// Memory for a thread to use again and again.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace gem_fast::cpu {

// It begins on a cache line: vectors across two lines take twice as long.
class Buffer {
 public:
  // Room for so many bytes; what was there is lost.
  void* of(int64_t bytes) {
    if (bytes > size_) {
      data_.reset(new (std::align_val_t{64}) char[bytes]);
      size_ = bytes;
    }
    return data_.get();
  }
  const void* data() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(char* data) const { operator delete[](data, std::align_val_t{64}); }
  };
  std::unique_ptr<char[], Delete> data_;
  int64_t size_ = 0;
};

}  // namespace gem_fast::cpu
