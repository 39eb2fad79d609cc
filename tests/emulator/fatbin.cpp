// Finding PTX in what cuModuleLoadData accepts: text, or fatbins one after the other.
//
// The container's layout is not documented by its maker; the fields used here are those that public
// tools agree on.

#include <cstring>

#include "runtime.h"

namespace emu {
namespace {

struct FatbinHeader {
    uint32_t magic;
    uint16_t version;
    uint16_t header_bytes;
    uint64_t payload_bytes;
};
struct EntryHeader {
    uint16_t kind;  // kPtx; 2 is a cubin
    uint16_t unknown;
    uint32_t header_bytes;
    uint64_t payload_bytes;
    uint32_t compressed_bytes;
    uint32_t options_offset;
    uint16_t minor;
    uint16_t major;
    uint32_t arch;
    uint32_t name_offset;
    uint32_t name_bytes;
    uint64_t flags;
    uint64_t reserved;
    uint64_t decompressed_bytes;
};
constexpr uint16_t kPtx = 1;
constexpr uint64_t kCompressed = 0x1000 | 0x2000 | 0x8000;

}  // namespace

std::vector<std::string_view> extract_ptx(std::span<const uint8_t> image, const Device& device) {
    uint32_t magic = 0;
    if (image.size() >= 4) std::memcpy(&magic, image.data(), 4);
    if (magic != kFatbinMagic) {
        const char* text = reinterpret_cast<const char*>(image.data());
        return {std::string_view(text, strnlen(text, image.size()))};
    }
    std::vector<std::string_view> texts;
    FatbinHeader header;
    for (size_t at = 0; at + sizeof header <= image.size();) {
        std::memcpy(&header, image.data() + at, sizeof header);
        if (header.magic != kFatbinMagic) break;
        size_t entry_at = at + header.header_bytes;
        const size_t end = std::min(image.size(), entry_at + header.payload_bytes);
        std::string_view best;
        std::string seen;
        uint32_t best_arch = 0;
        while (entry_at + sizeof(EntryHeader) <= end) {
            EntryHeader entry;
            std::memcpy(&entry, image.data() + entry_at, sizeof entry);
            if (entry.header_bytes == 0 || entry.payload_bytes > end - entry_at) break;
            if (entry.kind == kPtx) {
                if (entry.flags & kCompressed) throw PtxError("the fatbin's PTX is compressed");
                seen += " sm_" + std::to_string(entry.arch);
                if (entry.arch <= static_cast<uint32_t>(device.capability) &&
                    entry.arch >= best_arch) {
                    const char* text =
                        reinterpret_cast<const char*>(image.data() + entry_at + entry.header_bytes);
                    best = {text, strnlen(text, entry.payload_bytes)};
                    best_arch = entry.arch;
                }
            }
            entry_at += entry.header_bytes + entry.payload_bytes;
        }
        if (best.empty())
            throw PtxError("wrong target: the fatbin has PTX for" +
                           (seen.empty() ? " nothing" : seen) + ", the device is sm_" +
                           std::to_string(device.capability));
        texts.push_back(best);
        at = end;
    }
    if (texts.empty()) throw PtxError("the fatbin is cut off");
    return texts;
}

}  // namespace emu
