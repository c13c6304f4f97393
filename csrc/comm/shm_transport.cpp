#include "comm/shm_transport.h"
namespace ds::comm {
std::shared_ptr<Transport> make_shm_transport(const ShmGroup&, const Options&, std::string* why) { *why = "it is being written"; return nullptr; }
}
