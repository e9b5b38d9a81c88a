// Shared memory that knows, for every two bytes, whether they were written, by whom, and who read
// them since: reads of unwritten bytes, accesses out of bounds and races end the program.
//
// Two accesses to a place by two threads, at least one of them a write, need a barrier between:
// block_barrier, or warp_barrier inside a warp. Other collectives order nothing, as on the device.

#pragma once

#include <cstring>
#include <type_traits>

#include "fibres.h"

namespace dev::host {

constexpr uint32_t kGranule = 2;
constexpr int kNone = -1, kMany = -2;

// when a thread did something, in barriers passed
struct Moment {
  int block = kNone, warp_barriers = 0, warp = kNone, lane = kNone;
  Site site{};

  // whether what happened then is ordered before what the other thread does now
  bool before(const Moment& now) const {
    if (block < now.block) return true;
    if (warp != now.warp) return false;
    return warp_barriers < now.warp_barriers || (lane == now.lane && lane != kMany);
  }
};

struct Granule {
  enum { Unwritten, Arriving, Written } content = Unwritten;
  Moment write, read;  // kNone: never
};

// the dynamic shared memory of the block that runs
class SharedMemory {
 public:
  static SharedMemory& get() {
    static SharedMemory memory;
    return memory;
  }

  void reset(uint32_t bytes) {
    // of exactly this size, so that AddressSanitizer sees what lies beyond
    data_.reset(new (std::align_val_t(128)) unsigned char[bytes]);
    std::memset(data_.get(), 0xfe, bytes);
    granules_.assign((bytes + kGranule - 1) / kGranule, Granule{});
    bytes_ = bytes;
  }

  unsigned char* at(uint32_t offset) { return data_.get() + offset; }
  uint32_t bytes() const { return bytes_; }

  uint32_t offset(const void* p, uint32_t size, uint32_t alignment, const char* what, Site site) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(data_.get());
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (address < from || address + size > from + bytes_) {
      fail("%s: %u bytes at offset %lld lie outside the %u bytes of shared memory (%s:%d)", what,
           size, (long long)(address - from), bytes_, site.file, site.line);
    }
    if ((address - from) % alignment) {
      fail("%s: offset %llu in shared memory is not a multiple of %u (%s:%d)", what,
           (unsigned long long)(address - from), alignment, site.file, site.line);
    }
    return uint32_t(address - from);
  }

  static Moment now(Site site, bool whole_warp = false) {
    const Scheduler& s = Scheduler::get();
    const int warp = current->warp();
    return {s.block_epoch, s.warp_epoch[size_t(warp)], warp, whole_warp ? kMany : current->lane(),
            site};
  }

  void read(uint32_t offset, uint32_t size, Site site, bool whole_warp = false) {
    const Moment moment = now(site, whole_warp);
    for (uint32_t g = offset / kGranule; g < (offset + size + kGranule - 1) / kGranule; ++g) {
      Granule& place = granules_[g];
      if (place.content == Granule::Unwritten) {
        fail("read of unwritten shared memory, offset %u (%s:%d)", g * kGranule, site.file,
             site.line);
      }
      check(place, place.write, "written", "read", g, moment);
      if (place.content == Granule::Arriving) {
        fail("read of shared memory, offset %u, into which a cp_async (%s:%d) is under way (%s:%d)",
             g * kGranule, place.write.site.file, place.write.site.line, site.file, site.line);
      }
      if (place.read.block < moment.block || place.read.before(moment)) {
        place.read = moment;
      } else if (place.read.warp != moment.warp) {
        place.read.warp = place.read.lane = kMany;
      } else {
        place.read.lane = kMany;
      }
    }
  }

  void write(uint32_t offset, uint32_t size, Site site, bool arrives_later = false) {
    const Moment moment = now(site);
    for (uint32_t g = offset / kGranule; g < (offset + size + kGranule - 1) / kGranule; ++g) {
      Granule& place = granules_[g];
      if (place.content == Granule::Arriving) {
        fail("write to shared memory, offset %u, into which a cp_async (%s:%d) is under way "
             "(%s:%d)",
             g * kGranule, place.write.site.file, place.write.site.line, site.file, site.line);
      }
      check(place, place.write, "written", "written", g, moment);
      check(place, place.read, "read", "written", g, moment);
      place.content = arrives_later ? Granule::Arriving : Granule::Written;
      place.write = moment;
    }
  }

  // the end of an asynchronous write
  void arrive(uint32_t offset, uint32_t size, const unsigned char* data, Site site) {
    std::memcpy(at(offset), data, size);
    for (uint32_t g = offset / kGranule; g < (offset + size) / kGranule; ++g) {
      granules_[g].content = Granule::Written;
      granules_[g].write = now(site);
    }
  }

 private:
  struct Delete {
    void operator()(unsigned char* p) const { operator delete[](p, std::align_val_t(128)); }
  };

  static void check(const Granule&, const Moment& then, const char* was, const char* is, uint32_t g,
                    const Moment& now) {
    if (then.block == kNone || then.before(now)) return;
    char who[32] = "several threads";
    if (then.lane >= 0) std::snprintf(who, sizeof who, "thread %d", then.warp * kWarp + then.lane);
    fail("race: shared memory, offset %u, %s by %s (%s:%d), is %s here with no barrier between "
         "(%s:%d)",
         g * kGranule, was, who, then.site.file, then.site.line, is, now.site.file, now.site.line);
  }

  std::unique_ptr<unsigned char[], Delete> data_;
  std::vector<Granule> granules_;
  uint32_t bytes_ = 0;
};

// an index together with the place that it is used at
struct Index {
  uint32_t value;
  Site site;
  template <class I>
    requires std::is_integral_v<I>
  Index(I i, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : value(uint32_t(i)), site{file, line} {}
};

// what ptr() gives: only collectives and copies take it
class Address {
 public:
  explicit Address(void* p) : p_(p) {}
  operator void*() const { return p_; }

 private:
  void* p_;
};

template <class T>
T read_shared(uint32_t offset, Site site) {
  SharedMemory& memory = SharedMemory::get();
  T value;
  memory.read(offset, sizeof(T), site);
  std::memcpy(&value, memory.at(offset), sizeof(T));
  return value;
}

template <class T>
void write_shared(uint32_t offset, const T& value, Site site) {
  SharedMemory& memory = SharedMemory::get();
  memory.write(offset, sizeof(T), site);
  std::memcpy(memory.at(offset), &value, sizeof(T));
}

// what operator[] gives: reads where it is converted, writes where it is assigned to
template <class T>
class Reference {
 public:
  Reference(uint32_t offset, Site site) : offset_(offset), site_(site) {}
  operator T() const { return read_shared<T>(offset_, site_); }
  const Reference& operator=(const T& value) const {
    write_shared(offset_, value, site_);
    return *this;
  }
  const Reference& operator=(const Reference& other) const { return *this = T(other); }
  const Reference& operator+=(const T& value) const { return *this = T(*this) + value; }
  const Reference& operator*=(const T& value) const { return *this = T(*this) * value; }

 private:
  uint32_t offset_;
  Site site_;
};

}  // namespace dev::host

namespace dev {

template <class T>
class Shared {
  static_assert(sizeof(T) % host::kGranule == 0 && std::is_trivially_copyable_v<T>);

 public:
  Shared(uint32_t byte_offset, uint32_t count, host::Site site = host::Site::here())
      : offset_(byte_offset), count_(count) {
    host::SharedMemory& memory = host::SharedMemory::get();
    memory.offset(memory.at(0) + byte_offset, count * uint32_t(sizeof(T)), alignof(T), "Shared",
                  site);
  }

  host::Reference<T> operator[](host::Index i) const { return {place(i, 1), i.site}; }

  host::Address ptr(host::Index i, uint32_t count = 1) const {
    return host::Address(host::SharedMemory::get().at(place(i, count)));
  }

  // offset in shared memory of elements that must lie in this view
  uint32_t place(host::Index i, uint32_t count) const {
    if (uint64_t(i.value) + count > count_) {
      host::fail("elements %u to %lld of a Shared of %u (%s:%d)", i.value,
                 (long long)i.value + count - 1, count_, i.site.file, i.site.line);
    }
    return offset_ + i.value * uint32_t(sizeof(T));
  }

 private:
  uint32_t offset_, count_;
};

template <class V, class T>
V load_shared(const Shared<T>& from, host::Index i) {
  static_assert(sizeof(V) % sizeof(T) == 0);
  const uint32_t place = from.place(i, sizeof(V) / sizeof(T));
  host::SharedMemory& memory = host::SharedMemory::get();
  memory.offset(memory.at(place), sizeof(V), sizeof(V), "load_shared", i.site);
  return host::read_shared<V>(place, i.site);
}

template <class V, class T>
void store_shared(const Shared<T>& to, host::Index i, const V& value) {
  static_assert(sizeof(V) % sizeof(T) == 0);
  const uint32_t place = to.place(i, sizeof(V) / sizeof(T));
  host::SharedMemory& memory = host::SharedMemory::get();
  memory.offset(memory.at(place), sizeof(V), sizeof(V), "store_shared", i.site);
  host::write_shared(place, value, i.site);
}

template <class T>
float to_float(const host::Reference<T>& x) {
  return to_float(T(x));
}

}  // namespace dev
