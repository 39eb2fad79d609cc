#include "ptx.h"

#include <bit>
#include <cctype>
#include <charconv>
#include <cstdlib>
#include <cstring>

namespace emu {
namespace {

struct TypeRow {
    std::string_view name;
    Type type;
    int bits;
};
constexpr TypeRow kTypes[] = {
    {"pred", Type::pred, 1},      {"b8", Type::b8, 8},          {"b16", Type::b16, 16},
    {"b32", Type::b32, 32},       {"b64", Type::b64, 64},       {"b128", Type::b128, 128},
    {"u8", Type::u8, 8},          {"u16", Type::u16, 16},       {"u32", Type::u32, 32},
    {"u64", Type::u64, 64},       {"s8", Type::s8, 8},          {"s16", Type::s16, 16},
    {"s32", Type::s32, 32},       {"s64", Type::s64, 64},       {"u16x2", Type::u16x2, 32},
    {"s16x2", Type::s16x2, 32},   {"f16", Type::f16, 16},       {"f16x2", Type::f16x2, 32},
    {"bf16", Type::bf16, 16},     {"bf16x2", Type::bf16x2, 32}, {"f32", Type::f32, 32},
    {"f32x2", Type::f32x2, 64},   {"f64", Type::f64, 64},       {"tf32", Type::tf32, 32},
    {"e4m3", Type::e4m3, 8},      {"e5m2", Type::e5m2, 8},      {"e4m3x2", Type::e4m3x2, 16},
    {"e5m2x2", Type::e5m2x2, 16}, {"e2m1x2", Type::e2m1x2, 8},  {"ue8m0x2", Type::ue8m0x2, 16},
    {"e4m3x4", Type::e4m3x4, 32}, {"e5m2x4", Type::e5m2x4, 32}, {"b1", Type::b1, 1},
    {"s4", Type::s4, 4},          {"u4", Type::u4, 4},
};

bool is_word_char(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
           c == '.';
}

struct Token {
    enum class Kind : uint8_t { word, number, string, punct, end };
    Kind kind = Kind::end;
    std::string_view text;
    int line = 0;

    bool is(std::string_view s) const { return kind != Kind::string && text == s; }
};

std::vector<Token> tokenize(std::string_view text) {
    std::vector<Token> tokens;
    size_t i = 0;
    int line = 1;
    auto at = [&](size_t k) { return k < text.size() ? text[k] : '\0'; };
    while (i < text.size()) {
        char c = text[i];
        if (c == '\n') {
            ++line, ++i;
        } else if (std::isspace(static_cast<unsigned char>(c)) || c == '\0') {
            ++i;
        } else if (c == '/' && at(i + 1) == '/') {
            while (i < text.size() && text[i] != '\n') ++i;
        } else if (c == '/' && at(i + 1) == '*') {
            for (i += 2; i < text.size() && !(text[i] == '*' && at(i + 1) == '/'); ++i)
                line += text[i] == '\n';
            i += 2;
        } else if (c == '"') {
            size_t end = text.find('"', i + 1);
            if (end == text.npos)
                throw PtxError("line " + std::to_string(line) + ": unclosed string");
            tokens.push_back({Token::Kind::string, text.substr(i + 1, end - i - 1), line});
            i = end + 1;
        } else if (std::isdigit(static_cast<unsigned char>(c))) {
            size_t start = i;
            bool hex = c == '0' && (at(i + 1) == 'x' || at(i + 1) == 'X');
            while (is_word_char(at(i)) || (!hex && (at(i) == '+' || at(i) == '-') &&
                                           (at(i - 1) == 'e' || at(i - 1) == 'E') &&
                                           text.substr(start, i - start).find('.') != text.npos))
                ++i;
            tokens.push_back({Token::Kind::number, text.substr(start, i - start), line});
        } else if (is_word_char(c)) {
            size_t start = i;
            // A directive ends at its second dot: ".reg.b32" is two.
            if (c == '.') ++i;
            while ((is_word_char(at(i)) && !(c == '.' && at(i) == '.')) ||
                   (at(i) == ':' && at(i + 1) == ':'))
                i += at(i) == ':' ? 2 : 1;
            tokens.push_back({Token::Kind::word, text.substr(start, i - start), line});
        } else {
            tokens.push_back({Token::Kind::punct, text.substr(i, 1), line});
            ++i;
        }
    }
    tokens.push_back({Token::Kind::end, {}, line});
    return tokens;
}

struct Scope {
    int id;
    std::unordered_map<std::string, int> registers;                        // exact names
    std::unordered_map<std::string, std::pair<int, int>> register_ranges;  // %r<100>: first, count
    std::unordered_map<std::string, int> variables;
};

class Parser {
  public:
    explicit Parser(std::string_view text) : tokens_(tokenize(text)) {}

    Module run() {
        scopes_.push_back({next_scope_++, {}, {}, {}});
        while (peek().kind != Token::Kind::end) top_level();
        return std::move(module_);
    }

  private:
    const Token& peek(int ahead = 0) const {
        return tokens_[std::min(pos_ + ahead, tokens_.size() - 1)];
    }
    const Token& next() { return tokens_[std::min(pos_++, tokens_.size() - 1)]; }
    bool accept(std::string_view s) {
        if (!peek().is(s)) return false;
        ++pos_;
        return true;
    }
    [[noreturn]] void fail(const std::string& what) const {
        throw PtxError("PTX line " + std::to_string(peek().line) + ": " + what);
    }
    void expect(std::string_view s) {
        if (!accept(s))
            fail("expected '" + std::string(s) + "', got '" + std::string(peek().text) + "'");
    }
    std::string word() {
        if (peek().kind != Token::Kind::word)
            fail("expected a name, got '" + std::string(peek().text) + "'");
        return std::string(next().text);
    }

    uint64_t integer() {
        bool negative = accept("-");
        std::string_view t = next().text;
        uint64_t value = 0;
        int base = 10;
        if (t.starts_with("0x") || t.starts_with("0X"))
            base = 16, t.remove_prefix(2);
        else if (t.starts_with("0b") || t.starts_with("0B"))
            base = 2, t.remove_prefix(2);
        else if (t.size() > 1 && t[0] == '0')
            base = 8;
        while (!t.empty() && (t.back() == 'U' || t.back() == 'u')) t.remove_suffix(1);
        auto [end, error] = std::from_chars(t.data(), t.data() + t.size(), value, base);
        if (error != std::errc() || end != t.data() + t.size())
            fail("bad integer '" + std::string(t) + "'");
        return negative ? 0 - value : value;
    }

    void skip_to_semicolon() {
        while (!accept(";")) {
            if (peek().kind == Token::Kind::end) fail("unexpected end of file");
            ++pos_;
        }
    }

    void top_level() {
        const Token& token = peek();
        if (token.is(".version")) {
            next();
            module_.version = next().text;
        } else if (token.is(".target")) {
            next();
            module_.target = word();
            while (accept(",")) word();
        } else if (token.is(".address_size")) {
            next();
            if (integer() != 64) fail("only .address_size 64 is supported");
        } else if (token.is(".file")) {
            next();
            int id = static_cast<int>(integer());
            module_.files[id] = next().text;
            while (accept(",")) next();
        } else if (token.is(".section")) {  // debug information
            while (!accept("}")) {
                if (peek().kind == Token::Kind::end) fail("unclosed .section");
                next();
            }
        } else if (token.is(".pragma") || token.is(".alias")) {
            skip_to_semicolon();
        } else if (token.is(";")) {
            next();
        } else {
            bool is_extern = false;
            while (peek().is(".visible") || peek().is(".extern") || peek().is(".weak") ||
                   peek().is(".common"))
                is_extern |= next().is(".extern");
            if (peek().is(".entry") || peek().is(".func"))
                function();
            else
                variables(is_extern);
        }
    }

    // .space [.align n] [.attribute(...)] .type name[n][m] = init, ...;
    void variables(bool is_extern) {
        Variable proto;
        std::string space = word();
        if (space == ".global")
            proto.space = Space::global;
        else if (space == ".const")
            proto.space = Space::constant, proto.writable = false;
        else if (space == ".shared" || space == ".shared::cta")
            proto.space = Space::shared;
        else if (space == ".local")
            proto.space = Space::local;
        else if (space == ".param")
            proto.space = Space::param;
        else
            fail("unexpected '" + space + "'");
        variable_list(proto, is_extern);
        expect(";");
    }

    void variable_list(Variable proto, bool is_extern) {
        auto [type, align, width] = declared_type();
        proto.align = align;
        do {
            add_variable(declarator(proto, type, width, is_extern));
        } while (accept(","));
    }

    struct Declared {
        Type type;
        uint64_t align;
        int width;  // .v2, .v4
    };
    Declared declared_type() {
        uint64_t align = 0;
        int width = 1;
        for (;;) {
            std::string t = word();
            if (t == ".align")
                align = integer();
            else if (t == ".attribute" || t == ".ptr")
                skip_parentheses();
            else if (t == ".v2")
                width = 2;
            else if (t == ".v4")
                width = 4;
            else if (t == ".v8")
                width = 8;
            else if (auto type = parse_type(std::string_view(t).substr(1)); type && t[0] == '.')
                return {*type, align ? align : bytes_of(*type) * width, width};
            else if (t == ".texref" || t == ".surfref" || t == ".samplerref")
                return {Type::b64, 8, 1};
            else
                fail("unexpected '" + t + "' in a declaration");
        }
    }
    void skip_parentheses() {
        if (!accept("(")) return;
        while (!accept(")")) next();
    }

    Variable declarator(Variable v, Type type, int width, bool is_extern) {
        v.name = word();
        const uint64_t element = static_cast<uint64_t>(bytes_of(type)) * width;
        uint64_t count = 1;
        bool unsized = false;
        while (accept("[")) {
            if (accept("]")) {
                unsized = true;
                continue;
            }
            count *= integer();
            expect("]");
        }
        v.bytes = unsized ? 0 : element * count;
        v.is_extern = v.space == Space::shared && unsized && is_extern;
        if (accept("=")) {
            initialiser(v, type);
            if (unsized) v.bytes = v.data.size();
            v.data.resize(v.bytes);
        }
        return v;
    }

    void initialiser(Variable& v, Type type) {
        if (accept("{")) {
            while (!accept("}")) {
                initialiser(v, type);
                accept(",");
            }
            return;
        }
        const uint64_t at = v.data.size();
        const int size = bytes_of(type);
        v.data.resize(at + size);
        if (peek().kind == Token::Kind::word) {
            std::string symbol = word();
            if (symbol == "generic") {
                expect("(");
                symbol = word();
                expect(")");
            }
            int64_t addend = accept("+") ? static_cast<int64_t>(integer()) : 0;
            v.references.push_back({at, size, symbol, addend});
            return;
        }
        Operand value = number();
        uint64_t bits = value.bits;
        if (value.kind == Operand::Kind::real && !value.exact_f32 && type == Type::f32)
            bits = std::bit_cast<uint32_t>(static_cast<float>(std::bit_cast<double>(bits)));
        std::memcpy(v.data.data() + at, &bits, size);
    }

    int add_variable(Variable v) {
        const int index = static_cast<int>(module_.variables.size());
        scopes_.back().variables[v.name] = index;
        module_.variables.push_back(std::move(v));
        return index;
    }

    // ---- functions ------------------------------------------------------------------------------

    void function() {
        Function f;
        f.is_entry = next().is(".entry");
        scopes_.push_back({next_scope_++, {}, {}, {}});
        current_ = &f;
        if (!f.is_entry && peek().is("(")) f.results = parameters();
        f.name = word();
        if (peek().is("(")) f.params = parameters();
        directives(f);
        auto known = module_.function_index.find(f.name);
        int index = known != module_.function_index.end()
                        ? known->second
                        : static_cast<int>(module_.functions.size());
        if (known == module_.function_index.end()) {
            module_.function_index[f.name] = index;
            module_.functions.emplace_back().name = f.name;
        }
        if (!accept(";")) {
            f.has_body = true;
            labels_.clear();
            label_uses_.clear();
            scope_parent_.clear();
            expect("{");
            block();
            resolve_labels(f);
        }
        scopes_.pop_back();
        if (f.has_body || !module_.functions[index].has_body)
            module_.functions[index] = std::move(f);
        current_ = nullptr;
    }

    std::vector<int> parameters() {
        std::vector<int> indices;
        expect("(");
        while (!accept(")")) {
            Variable proto;
            proto.space = Space::param;
            std::string space = word();
            if (space != ".param") fail("expected .param, got '" + space + "'");
            uint64_t align = 0;
            Type type = Type::none;
            int width = 1;
            for (;;) {  // .align 64 .b8 name[128], .u64 .ptr .global .align 16 name
                if (peek().text.size() > 1 && peek().text[0] == '.') {
                    std::string t = word();
                    if (t == ".align") {
                        uint64_t n = integer();
                        if (type == Type::none) align = n;
                    } else if (auto parsed = parse_type(std::string_view(t).substr(1))) {
                        type = *parsed;
                    }
                } else {
                    break;
                }
            }
            proto.align = align ? align : bytes_of(type);
            indices.push_back(add_variable(declarator(proto, type, width, false)));
            accept(",");
        }
        return indices;
    }

    void directives(Function& f) {
        auto three = [&](uint32_t (&out)[3]) {
            for (int i = 0; i < 3; ++i)
                out[i] = i == 0 || accept(",") ? static_cast<uint32_t>(integer()) : 1;
        };
        for (;;) {
            if (accept(".maxntid"))
                three(f.max_threads);
            else if (accept(".reqntid"))
                three(f.required_threads);
            else if (accept(".reqnctapercluster"))
                three(f.required_cluster);
            else if (accept(".minnctapersm") || accept(".maxnreg") || accept(".maxnctapersm") ||
                     accept(".maxclusterrank"))
                integer();
            else if (accept(".pragma"))
                skip_to_semicolon();
            else if (accept(".noreturn") || accept(".explicitcluster"))
                continue;
            else if (peek().is(".attribute")) {
                next();
                skip_parentheses();
            } else
                return;
        }
    }

    void block() {
        const int scope = scopes_.back().id;
        while (!accept("}")) {
            const Token& token = peek();
            if (token.kind == Token::Kind::end) fail("unclosed function body");
            if (accept("{")) {
                const int id = next_scope_++;
                scope_parent_[id] = scope;
                scopes_.push_back({id, {}, {}, {}});
                block();
                scopes_.pop_back();
            } else if (token.is(".reg")) {
                next();
                registers();
            } else if (token.is(".loc")) {
                next();
                file_ = static_cast<int>(integer());
                file_line_ = static_cast<int>(integer());
                integer();
                while (accept(",")) {  // function_name <label>, inlined_at <file> <line> <col>
                    while (peek().kind == Token::Kind::word && !peek().is(".loc")) {
                        bool place = peek().is("inlined_at");
                        next();
                        if (place) {
                            integer(), integer(), integer();
                            break;
                        }
                        if (accept("+")) integer();
                        if (peek().is(",")) break;
                    }
                }
            } else if (token.is(".pragma")) {
                skip_to_semicolon();
            } else if (token.kind == Token::Kind::word && peek(1).is(":")) {
                label_definition();
            } else if (token.text.starts_with('.')) {
                variables(false);
            } else if (!accept(";")) {
                statement();
            }
        }
    }

    void label_definition() {
        std::string name = word();
        expect(":");
        if (peek().is(".branchtargets")) {
            next();
            std::vector<int>& targets = current_->branch_targets[name];
            do {
                label_uses_.push_back(
                    {-1, static_cast<int>(targets.size()), scopes_.back().id, word(), name});
                targets.push_back(-1);
            } while (accept(","));
            expect(";");
        } else if (peek().is(".callprototype") || peek().is(".calltargets")) {
            skip_to_semicolon();
        } else {
            labels_[name + "#" + std::to_string(scopes_.back().id)] =
                static_cast<int>(current_->statements.size());
        }
    }

    void registers() {
        auto [type, align, width] = declared_type();
        do {
            std::string name = word();
            const int first = static_cast<int>(current_->registers.size());
            if (accept("<")) {
                const int count = static_cast<int>(integer());
                expect(">");
                scopes_.back().register_ranges[name] = {first, count};
                for (int i = 0; i < count; ++i)
                    current_->registers.push_back({type, name + std::to_string(i)});
            } else {
                scopes_.back().registers[name] = first;
                current_->registers.push_back({type, name});
            }
        } while (accept(","));
        expect(";");
    }

    int find_register(const std::string& name) const {
        size_t digits = name.size();
        while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
        for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
            if (auto it = scope->registers.find(name); it != scope->registers.end())
                return it->second;
            if (digits == name.size()) continue;
            auto it = scope->register_ranges.find(name.substr(0, digits));
            if (it == scope->register_ranges.end()) continue;
            int number = std::atoi(name.c_str() + digits);
            if (number < it->second.second) return it->second.first + number;
        }
        return -1;
    }

    int find_variable(const std::string& name) const {
        for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
            if (auto it = scope->variables.find(name); it != scope->variables.end())
                return it->second;
        return -1;
    }

    void statement() {
        Statement s;
        s.line = peek().line;
        s.file = file_;
        s.file_line = file_line_;
        const char* begin = peek().text.data();
        if (accept("@")) {
            s.guard_negated = accept("!");
            std::string name = word();
            s.guard = find_register(name);
            if (s.guard < 0) fail("unknown guard predicate '" + name + "'");
        }
        std::string head = word();
        size_t start = 0;
        for (size_t i = 0; i <= head.size(); ++i) {
            if (i != head.size() && head[i] != '.') continue;
            if (start == 0)
                s.opcode = head.substr(0, i);
            else
                s.mods.push_back(head.substr(start, i - start));
            start = i + 1;
        }
        if (!peek().is(";")) {
            do {
                s.operands.push_back(operand());
                if (s.operands.back().kind == Operand::Kind::label)
                    label_uses_.push_back({static_cast<int>(current_->statements.size()),
                                           static_cast<int>(s.operands.size()) - 1,
                                           scopes_.back().id,
                                           s.operands.back().name,
                                           {}});
            } while (accept(","));
        }
        const char* end = peek().text.data();
        expect(";");
        s.text.assign(begin, end - begin);
        for (char& c : s.text)
            if (c == '\t' || c == '\n') c = ' ';
        current_->statements.push_back(std::move(s));
    }

    Operand list(std::string_view close) {
        Operand o;
        o.kind = Operand::Kind::list;
        while (!accept(close)) {
            o.items.push_back(operand());
            accept(",");
        }
        return o;
    }

    Operand operand() {
        if (accept("{")) return list("}");
        if (accept("(")) return list(")");
        if (accept("[")) {
            Operand o;
            o.kind = Operand::Kind::address;
            Operand base = operand();
            o.offset = base.offset;
            base.offset = 0;
            if (accept("+"))
                o.offset += static_cast<int64_t>(integer());
            else if (peek().is("-"))
                o.offset += static_cast<int64_t>(integer());
            o.items.push_back(std::move(base));
            while (accept(",")) o.items.push_back(operand());
            expect("]");
            return o;
        }
        if (accept("!")) {
            Operand o = operand();
            o.negated = !o.negated;
            return o;
        }
        if (peek().kind == Token::Kind::number || peek().is("-")) return number();
        Operand o;
        o.name = word();
        if (o.name == "_") {
            o.kind = Operand::Kind::sink;
        } else if (int reg = find_register(o.name); reg >= 0) {
            o.kind = Operand::Kind::reg;
            o.index = reg;
        } else if (int variable = find_variable(o.name); variable >= 0) {
            o.kind = Operand::Kind::variable;
            o.index = variable;
            if (accept("+")) o.offset = static_cast<int64_t>(integer());
        } else if (auto f = module_.function_index.find(o.name);
                   f != module_.function_index.end()) {
            o.kind = Operand::Kind::function;
            o.index = f->second;
        } else if (o.name == current_->name) {
            o.kind = Operand::Kind::function;
            o.index = -1;
        } else if (o.name[0] == '%' || o.name == "WARP_SZ") {
            o.kind = Operand::Kind::special;
        } else {
            o.kind = Operand::Kind::label;
        }
        if (accept("|")) o.items.push_back(operand());
        return o;
    }

    Operand number() {
        Operand o;
        bool negative = accept("-");
        std::string_view t = peek().text;
        auto hex_bits = [&](int digits) {
            o.kind = Operand::Kind::real;
            if (std::from_chars(t.data() + 2, t.data() + t.size(), o.bits, 16).ec != std::errc() ||
                static_cast<int>(t.size()) != digits + 2)
                fail("bad number '" + std::string(t) + "'");
            next();
            if (negative) o.bits ^= 1ull << (digits * 4 - 1);
        };
        if (t.starts_with("0f") || t.starts_with("0F")) {
            hex_bits(8);
            o.exact_f32 = true;
        } else if (t.starts_with("0d") || t.starts_with("0D")) {
            hex_bits(16);
        } else if (!t.starts_with("0x") && t.find_first_of(".eE") != t.npos) {
            o.kind = Operand::Kind::real;
            double value = std::strtod(std::string(t).c_str(), nullptr);
            o.bits = std::bit_cast<uint64_t>(negative ? -value : value);
            next();
        } else {
            o.kind = Operand::Kind::integer;
            o.bits = negative ? 0 - integer() : integer();
        }
        return o;
    }

    struct LabelUse {
        int statement;
        int operand;
        int scope;
        std::string name;
        std::string table;  // a .branchtargets list, when statement is -1
    };

    void resolve_labels(Function& f) {
        for (const LabelUse& use : label_uses_) {
            int target = -1;
            for (int scope = use.scope; target < 0;) {
                auto it = labels_.find(use.name + "#" + std::to_string(scope));
                if (it != labels_.end()) target = it->second;
                auto parent = scope_parent_.find(scope);
                if (parent == scope_parent_.end()) break;
                scope = parent->second;
            }
            if (use.statement < 0) {
                if (target < 0) fail("unknown label '" + use.name + "'");
                f.branch_targets[use.table][use.operand] = target;
                continue;
            }
            Operand& o = f.statements[use.statement].operands[use.operand];
            o.index = target;
            if (target < 0) o.kind = Operand::Kind::word;
        }
    }

    std::vector<Token> tokens_;
    size_t pos_ = 0;
    Module module_;
    std::vector<Scope> scopes_;
    Function* current_ = nullptr;
    std::unordered_map<std::string, int> labels_;
    std::unordered_map<int, int> scope_parent_;
    std::vector<LabelUse> label_uses_;
    int next_scope_ = 0;
    int file_ = 0;
    int file_line_ = 0;
};

}  // namespace

int bits_of(Type type) {
    for (const TypeRow& row : kTypes)
        if (row.type == type) return row.bits;
    return 0;
}

bool is_signed(Type type) {
    return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64;
}

std::optional<Type> parse_type(std::string_view name) {
    for (const TypeRow& row : kTypes)
        if (row.name == name) return row.type;
    return std::nullopt;
}

Module parse_ptx(std::string_view text) { return Parser(text).run(); }

}  // namespace emu
