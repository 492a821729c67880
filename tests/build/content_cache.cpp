// ContentCache: the same content gives the same value, anything else another; what was used last is kept.
#include "../../csrc/engine/cuda/content_cache.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace {

int made = 0;
int make() { return ++made; }

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("not so: %s\n", what);
  std::exit(1);
}

std::string table(int which, size_t bytes) {
  std::string content(bytes, 'x');
  content[bytes / 2] = static_cast<char>(which);  // where no fingerprint of both ends looks
  return content;
}

}  // namespace

int main() {
  const int one = 0, two = 0;
  fusedamp::cuda::ContentCache<int> cache(1000);

  std::string content = table(1, 300);
  const int first = cache.get(&one, 0, content, make);
  expect(cache.get(&one, 0, table(1, 300), make) == first, "the same content elsewhere is found");
  content[150] = 'y';
  const int changed = cache.get(&one, 0, content, make);
  expect(changed != first, "content that changed in place is other content");
  expect(cache.get(&one, 0, table(1, 300), make) == first, "the first content is still known");
  expect(cache.get(&two, 0, table(1, 300), make) != first, "another stream has copies of its own");
  expect(cache.get(&one, 1, table(1, 300), make) != first, "another device has copies of its own");

  // Three of 300 bytes fit into 1000: of first, changed, two's, one's on device 1, the oldest is gone.
  expect(cache.get(&one, 0, table(1, 300), make) == first, "what was used last is kept");
  expect(cache.get(&one, 0, content, make) != changed, "what was not used for longest is dropped");

  const int large = cache.get(&one, 0, table(2, 5000), make);
  expect(cache.get(&one, 0, table(2, 5000), make) == large, "one that is too large is kept alone");
  expect(cache.get(&one, 0, table(1, 300), make) != first, "and drops the others");

  const int before = made;
  try {
    cache.get(&one, 0, table(3, 10), []() -> int { throw std::runtime_error("no memory"); });
    expect(false, "an error passes through");
  } catch (const std::runtime_error&) {
  }
  expect(cache.get(&one, 0, table(3, 10), make) == before + 1, "and leaves nothing behind");
  for (int i = 0; i < 100; ++i) cache.get(&one, i, table(i, 1 + i), make);
  std::printf("ok\n");
}
