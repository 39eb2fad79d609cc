// The PTX text as a syntax tree: what is declared, and one Statement per instruction.
//
// Names are resolved while parsing: registers to an index into their function's table, variables to
// an index into the module's, labels to a statement index. What an opcode means is not known here.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace emu {

enum class Type : uint8_t {
    none,
    pred,
    b8,
    b16,
    b32,
    b64,
    b128,
    u8,
    u16,
    u32,
    u64,
    s8,
    s16,
    s32,
    s64,
    u16x2,
    s16x2,
    f16,
    f16x2,
    bf16,
    bf16x2,
    f32,
    f32x2,
    f64,
    tf32,
    e4m3,
    e5m2,
    e4m3x2,
    e5m2x2,
    e2m1x2,
    ue8m0x2,
    e4m3x4,
    e5m2x4,
    b1,
    s4,
    u4,
};

int bits_of(Type type);
inline int bytes_of(Type type) { return bits_of(type) / 8; }
bool is_signed(Type type);
std::optional<Type> parse_type(std::string_view name);

enum class Space : uint8_t { generic, constant, global, local, param, shared };

struct PtxError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Operand {
    enum class Kind : uint8_t {
        reg,
        special,
        integer,
        real,
        variable,
        function,
        label,
        list,
        address,
        sink,
        word
    };
    Kind kind = Kind::sink;
    int index = -1;          // register, variable, function or (label) statement index
    uint64_t bits = 0;       // integer: the value; real: the bits of a double
    bool exact_f32 = false;  // real written as 0fXXXXXXXX: `bits` holds the single's bits
    bool negated = false;    // !p
    int64_t offset = 0;      // address: [base + offset]; variable: symbol + offset
    std::string name;
    // list: the elements; address: base, then a coordinate list if there is one;
    // reg with one element: the second half of `p|q`.
    std::vector<Operand> items;
};

struct Statement {
    std::string opcode;             // first word, up to the first dot
    std::vector<std::string> mods;  // the rest, without dots
    std::vector<Operand> operands;
    int guard = -1;  // register index of @p
    bool guard_negated = false;
    std::string text;
    int line = 0;  // in the PTX
    int file = 0;  // .loc
    int file_line = 0;
};

// What reports say of a statement, words of which are kept elsewhere.
struct StatementText {
    std::string_view text, opcode;
    int line, file, file_line;
};

struct Register {
    Type type;
    std::string name;
};

struct Reference {  // an address inside an initialiser
    uint64_t at;
    int bytes;
    std::string symbol;
    int64_t addend;
};

struct Variable {
    std::string name;
    Space space = Space::global;
    uint64_t bytes = 0;
    uint64_t align = 1;
    bool is_extern = false;  // unsized shared array: its bytes come from the launch
    bool writable = true;
    std::vector<uint8_t> data;
    std::vector<Reference> references;
};

struct Function {
    std::string name;
    bool is_entry = false;
    bool has_body = false;
    std::vector<int> params;  // variable indices, space param
    std::vector<int> results;
    std::vector<Register> registers;
    std::vector<Statement> statements;
    std::unordered_map<std::string, std::vector<int>> branch_targets;  // .branchtargets tables
    uint32_t max_threads[3] = {0, 0, 0};
    uint32_t required_threads[3] = {0, 0, 0};
    uint32_t required_cluster[3] = {0, 0, 0};
};

struct Module {
    std::string version;
    std::string target;  // sm_90a, ...
    std::vector<Variable> variables;
    std::vector<Function> functions;
    std::unordered_map<std::string, int> function_index;
    std::unordered_map<int, std::string> files;
};

Module parse_ptx(std::string_view text);

}  // namespace emu
