// Caches values by the content that they were computed from; changed content is a different key, so values are never
// stale.
#pragma once
#include <algorithm>
#include <list>
#include <string>
#include <string_view>
#include <unordered_map>

namespace fusedamp::cuda {

// Keeps the most recently used values, with at most `most_bytes` of content in total (or one of any size).
template <class Value>
class ContentCache {
 public:
  explicit ContentCache(size_t most_bytes) : most_bytes_(most_bytes) {}

  // Returns the cached result of make() for the same stream, device and content, or calls it.
  template <class Make>
  Value get(const void* stream, int device, std::string_view content, Make make) {
    const Key key = {stream, device, content};
    if (const auto known = index_.find(key); known != index_.end()) {
      entries_.splice(entries_.begin(), entries_, known->second);
      return known->second->value;
    }
    entries_.push_front({std::string(content), key, make()});
    entries_.front().key.content = entries_.front().content;
    index_.emplace(entries_.front().key, entries_.begin());
    kept_bytes_ += content.size();
    while (kept_bytes_ > most_bytes_ && entries_.size() > 1) {
      kept_bytes_ -= entries_.back().content.size();
      index_.erase(entries_.back().key);
      entries_.pop_back();
    }
    return entries_.front().value;
  }

 private:
  struct Key {
    const void* stream;
    int device;
    std::string_view content;
    bool operator==(const Key& other) const {
      return stream == other.stream && device == other.device && content == other.content;
    }
  };
  struct Hash {  // for tables of addresses, the first and last rows distinguish nearly all
    size_t operator()(const Key& key) const {
      const size_t n = key.content.size(), part = std::min<size_t>(n, 64);
      const std::hash<std::string_view> hash;
      return hash(key.content.substr(0, part)) ^ 31 * hash(key.content.substr(n - part)) ^ n;
    }
  };
  struct Entry {
    std::string content;
    Key key;  // refers to `content`
    Value value;
  };

  size_t most_bytes_, kept_bytes_ = 0;
  std::list<Entry> entries_;  // most recently used first
  std::unordered_map<Key, typename std::list<Entry>::iterator, Hash> index_;
};

}  // namespace fusedamp::cuda
