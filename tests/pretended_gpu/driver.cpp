// A CUDA driver and runtime without a GPU, in one library, which torch's CUDA build loads in place of both.
//
// Streams, events, graphs and the rules of capture are those of the CUDA documentation; a call that a capture forbids
// fails as there, and makes the capture invalid. Operators and kernels run in Python, through two callbacks. Every
// access to device memory is compared with earlier ones: what events and waits do not order is a race. Memory that the
// host reads too early holds 0xA5.

#define __dv(x)
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <unordered_map>
#include <vector>

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace {
// Never held while Python runs, which may wait for its own lock.
std::recursive_mutex mutex;
#define LOCK std::lock_guard<std::recursive_mutex> guard(mutex)

std::string complaints;
FILE *log_file = getenv("PRETENDED_GPU_LOG") ? fopen(getenv("PRETENDED_GPU_LOG"), "a") : nullptr;

void say(const char *format, ...) {
    if (!log_file) return;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(log_file, format, arguments);
    va_end(arguments);
    fputc('\n', log_file);
    fflush(log_file);
}

void complain(const std::string &text) {
    say("%s", text.c_str());
    complaints += text + "\n";
}

// ---- clocks, streams, events, captures
// By stream: how many of its operations are known to be done.
typedef std::vector<uint64_t> Clock;

void join(Clock &clock, const Clock &other) {
    if (clock.size() < other.size()) clock.resize(other.size());
    for (size_t i = 0; i < other.size(); i++) clock[i] = std::max(clock[i], other[i]);
}
bool covers(const Clock &clock, int stream, uint64_t time) {
    return time == 0 || (stream < (int)clock.size() && clock[stream] >= time);
}

struct Stream;
typedef std::map<Stream *, uint64_t> CapturedClock;
typedef std::function<void(Stream *)> Node;

struct Graph {
    std::vector<Node> nodes;
};
struct Capture : Graph {
    unsigned long long id;
    int mode;
    std::thread::id thread;
    Stream *origin;
    bool invalid = false;
    std::map<Stream *, CapturedClock> clocks;
};
struct Stream {
    int index, device;
    unsigned flags;
    int priority;
    Clock clock;
    Capture *capture = nullptr;
};
struct Event {
    bool recorded = false;
    Clock clock;
    Capture *capture = nullptr;
    unsigned long long capture_id = 0;
    CapturedClock captured_clock;
    double milliseconds = 0;
};

const int MAX_DEVICES = 8;
const int num_devices = getenv("PRETENDED_GPU_DEVICES") ? atoi(getenv("PRETENDED_GPU_DEVICES")) : 1;
std::vector<Stream *> streams;
std::set<Capture *> captures;
unsigned long long next_capture = 1;
Clock host;
thread_local int current_device = 0, thread_mode = cudaStreamCaptureModeGlobal;

Stream *new_stream(unsigned flags, int priority, int device) {
    LOCK;
    streams.push_back(new Stream{(int)streams.size(), device, flags, priority});
    return streams.back();
}
// The legacy default streams, one for each device, come first.
const bool defaults_made = [] {
    for (int device = 0; device < MAX_DEVICES; device++) new_stream(0, 0, device);
    return true;
}();
bool is_default(const Stream *stream) { return stream->index < MAX_DEVICES; }
Stream *stream_of(void *handle) { return handle <= (void *)2 ? streams[current_device] : (Stream *)handle; }

uint64_t advance(Stream *stream) {
    join(stream->clock, host);
    if ((int)stream->clock.size() <= stream->index) stream->clock.resize(stream->index + 1);
    if (is_default(stream)) {
        for (auto other : streams)
            if (!is_default(other) && other->device == stream->device && !(other->flags & cudaStreamNonBlocking))
                join(stream->clock, other->clock);
    } else if (!(stream->flags & cudaStreamNonBlocking)) join(stream->clock, streams[stream->device]->clock);
    return ++stream->clock[stream->index];
}

cudaError_t invalidate(Capture *capture, const char *call, cudaError_t error) {
    say("%s is not allowed in capture %llu", call, capture->id);
    capture->invalid = true;
    return error;
}
// For calls that a capture forbids: to its own thread, and in global mode to all.
cudaError_t check_captures(const char *call) {
    LOCK;
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    for (auto capture : captures) {
        bool own = capture->thread == std::this_thread::get_id();
        if (own ? capture->mode != cudaStreamCaptureModeRelaxed
                : capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal)
            return invalidate(capture, call, cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
}
#define CHECK(expression)                                                                                              \
    if (cudaError_t failed = (expression)) return failed

// Runs a node, or adds it to the capture of its stream.
cudaError_t submit(Stream *stream, Node node) {
    {
        LOCK;
        if (stream->capture) {
            if (stream->capture->invalid) return cudaErrorStreamCaptureInvalidated;
            stream->capture->clocks[stream][stream]++;
            stream->capture->nodes.push_back(std::move(node));
            return cudaSuccess;
        }
    }
    node(stream);
    return cudaSuccess;
}

// ---- copies that the host has not waited for
struct Copy {
    int stream;
    uint64_t time;
    void *address;
    std::vector<uint8_t> data;
    bool to_device;
};
std::vector<Copy> pending;

void host_waits(const Clock &clock) {
    join(host, clock);
    std::vector<Copy> rest;
    for (auto &copy : pending) {
        if (!covers(host, copy.stream, copy.time)) rest.push_back(std::move(copy));
        else if (!copy.to_device) memcpy(copy.address, copy.data.data(), copy.data.size());
        else if (memcmp(copy.address, copy.data.data(), copy.data.size()))
            complain("host memory was written while a copy from it was in flight");
    }
    pending.swap(rest);
}

// ---- races
const int GRANULE_BITS = 6;
const size_t LARGEST_CHECKED = 1 << 22;
struct Accesses {
    int writer = -1;
    uint64_t time = 0;
    std::string what;
    std::map<int, std::pair<uint64_t, std::string>> readers;
};
std::unordered_map<uintptr_t, Accesses> accesses;

void access(Stream *stream, uint64_t time, uintptr_t address, size_t bytes, bool write, const std::string &what) {
    if (!bytes || bytes > LARGEST_CHECKED) return;
    bool told = false;
    auto check = [&](int other, uint64_t then, const char *kind, const std::string &earlier) {
        if (other < 0 || other == stream->index || told || covers(stream->clock, other, then)) return;
        complain("race: " + what + " on stream " + std::to_string(stream->index) + " is not ordered after the " + kind +
                 " of " + earlier + " on stream " + std::to_string(other));
        told = true;
    };
    for (uintptr_t granule = address >> GRANULE_BITS; granule <= (address + bytes - 1) >> GRANULE_BITS; granule++) {
        Accesses &seen = accesses[granule];
        check(seen.writer, seen.time, "write", seen.what);
        if (write) {
            for (auto &reader : seen.readers) check(reader.first, reader.second.first, "read", reader.second.second);
            seen = {stream->index, time, what, {}};
        } else seen.readers[stream->index] = {time, what};
    }
}

// ---- memory: one arena, at the same addresses in the process that interprets kernels
enum Kind { UNKNOWN, HOST, DEVICE };
struct Block {
    size_t bytes;
    Kind kind;
    int device;
};
const uintptr_t ARENA = 0x400000000000;
const size_t ARENA_BYTES = (size_t)256 << 30, PAGE = 2 << 20, POISONED = 4 << 20;
const size_t total_memory = (size_t)(getenv("PRETENDED_GPU_GIB") ? atoi(getenv("PRETENDED_GPU_GIB")) : 8) << 30;
size_t used_memory = 0;
std::map<uintptr_t, Block> blocks;
std::map<uintptr_t, size_t> holes;

void make_arena() {
    static bool made = false;
    if (made) return;
    made = true;
    const char *path = getenv("PRETENDED_GPU_ARENA");
    int file = path ? open(path, O_RDWR | O_CREAT, 0600) : -1;
    int flags = MAP_FIXED_NOREPLACE | MAP_NORESERVE | (path ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS);
    if ((path && ftruncate(file, ARENA_BYTES)) ||
        mmap((void *)ARENA, ARENA_BYTES, PROT_READ | PROT_WRITE, flags, file, 0) != (void *)ARENA) {
        perror("the memory of the pretended GPU");
        abort();
    }
    holes[ARENA] = ARENA_BYTES;
}
size_t pages(size_t bytes) { return (bytes + PAGE - 1) & ~(PAGE - 1); }

const Block *block_at(const void *address) {
    auto next = blocks.upper_bound((uintptr_t)address);
    if (next == blocks.begin()) return nullptr;
    auto found = std::prev(next);
    bool inside = (uintptr_t)address < found->first + std::max<size_t>(found->second.bytes, 1);
    return inside ? &found->second : nullptr;
}
Kind kind_at(const void *address) {
    auto block = block_at(address);
    return block ? block->kind : UNKNOWN;
}

void copy_now(Stream *stream, void *to, const void *from, size_t bytes, bool waits, const std::string &what) {
    LOCK;
    uint64_t time = advance(stream);
    Kind source = kind_at(from), target = kind_at(to);
    if (source == DEVICE) access(stream, time, (uintptr_t)from, bytes, false, what);
    if (target == DEVICE) access(stream, time, (uintptr_t)to, bytes, true, what);
    auto data = [&] { return std::vector<uint8_t>((const uint8_t *)from, (const uint8_t *)from + bytes); };
    if (source == DEVICE && target == HOST && !waits) {
        pending.push_back({stream->index, time, to, data(), false});
        memset(to, 0xA5, bytes);
        return;
    }
    if (source == HOST && target == DEVICE && !waits)
        pending.push_back({stream->index, time, (void *)from, data(), true});
    memmove(to, from, bytes);
    if (waits || (source == DEVICE && target == UNKNOWN)) host_waits(stream->clock);
}

// ---- Python
typedef void (*LaunchCallback)(void *function, const unsigned *grid, unsigned block, unsigned shared_bytes,
                               const void *parameters, size_t bytes);
typedef void (*NodeCallback)(uint64_t id);
LaunchCallback launch_callback = nullptr;
NodeCallback node_callback = nullptr;
thread_local Stream *running = nullptr;
thread_local uint64_t running_time = 0;

// ---- code of kernels: offsets and sizes of parameters, from the ELF section .nv.info.NAME
struct Parameter {
    uint16_t ordinal, offset;
    int bytes;
};
struct Function {
    std::string name;
    std::vector<Parameter> parameters;
};
void read_parameters(Function *function, const char *image) {
    auto header = (const Elf64_Ehdr *)image;
    auto sections = (const Elf64_Shdr *)(image + header->e_shoff);
    const char *names = image + sections[header->e_shstrndx].sh_offset;
    const int WITH_SIZE = 4, PARAMETER_INFO = 0x17;
    for (int i = 0; i < header->e_shnum; i++) {
        if (".nv.info." + function->name != names + sections[i].sh_name) continue;
        auto entry = (const uint8_t *)image + sections[i].sh_offset, end = entry + sections[i].sh_size;
        while (entry + 4 <= end) {
            if (entry[0] == WITH_SIZE && entry[1] == PARAMETER_INFO) {
                Parameter parameter;
                uint32_t word;
                memcpy(&parameter.ordinal, entry + 8, 2);
                memcpy(&parameter.offset, entry + 10, 2);
                memcpy(&word, entry + 12, 4);
                parameter.bytes = word >> 18;
                function->parameters.push_back(parameter);
            }
            entry += 4 + (entry[0] == WITH_SIZE ? entry[2] | entry[3] << 8 : 0);
        }
    }
    std::sort(function->parameters.begin(), function->parameters.end(),
              [](const Parameter &a, const Parameter &b) { return a.ordinal < b.ordinal; });
}

thread_local cudaError_t last_error = cudaSuccess;
cudaError_t keep(cudaError_t error) {
    if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
    return error;
}
const struct {
    cudaError_t error;
    const char *name, *text;
} ERRORS[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureMerge, "cudaErrorStreamCaptureMerge",
     "operation would result in a merge of separate capture sequences"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched",
     "capture was not ended in the same stream as it began"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
};
int attribute(int runtime_attribute) {
    // The numbers are the same in both APIs. An H100's.
    switch (runtime_attribute) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    default: return 0;
    }
}
const int VERSION = CUDA_VERSION / 1000 * 1000;

// ---- the calls of the runtime that have rules
cudaError_t allocate(void **address, size_t bytes) {
    CHECK(check_captures("cudaMalloc"));
    LOCK;
    make_arena();
    size_t needed = pages(bytes);
    auto hole = std::find_if(holes.begin(), holes.end(), [&](auto &each) { return each.second >= needed; });
    if (used_memory + bytes > total_memory || hole == holes.end()) return cudaErrorMemoryAllocation;
    uintptr_t start = hole->first;
    size_t rest = hole->second - needed;
    holes.erase(hole);
    if (rest) holes[start + needed] = rest;
    mprotect((void *)start, needed, PROT_READ | PROT_WRITE);
    // Fresh device memory holds anything.
    memset((void *)start, 0xC3, std::min(bytes, POISONED));
    used_memory += bytes;
    blocks[start] = {bytes, DEVICE, current_device};
    *address = (void *)start;
    return cudaSuccess;
}

cudaError_t release(void *address) {
    if (!address) return cudaSuccess;
    CHECK(check_captures("cudaFree"));
    LOCK;
    auto block = blocks.find((uintptr_t)address);
    if (block == blocks.end()) return cudaErrorInvalidValue;
    uintptr_t start = block->first;
    size_t bytes = block->second.bytes, size = pages(bytes);
    for (auto stream : streams)
        if (!stream->capture) host_waits(stream->clock);
    for (uintptr_t granule = start >> GRANULE_BITS; granule <= (start + bytes - 1) >> GRANULE_BITS; granule++)
        accesses.erase(granule);
    // A later access faults.
    madvise(address, size, MADV_REMOVE);
    mprotect(address, size, PROT_NONE);
    auto hole = holes.emplace(start, size).first;
    auto next = std::next(hole);
    if (next != holes.end() && next->first == start + size) {
        hole->second += next->second;
        holes.erase(next);
    }
    if (hole != holes.begin()) {
        auto previous = std::prev(hole);
        if (previous->first + previous->second == start) {
            previous->second += hole->second;
            holes.erase(hole);
        }
    }
    used_memory -= bytes;
    blocks.erase(block);
    return cudaSuccess;
}

cudaError_t wait_for_stream(Stream *stream, bool query) {
    const char *call = query ? "cudaStreamQuery" : "cudaStreamSynchronize";
    LOCK;
    if (stream->capture) return invalidate(stream->capture, call, cudaErrorStreamCaptureUnsupported);
    CHECK(check_captures(call));
    uint64_t time = stream->index < (int)stream->clock.size() ? stream->clock[stream->index] : 0;
    // The device is as slow as it may be: what nobody waits for is not done.
    if (query && !covers(host, stream->index, time)) return cudaErrorNotReady;
    if (!query) advance(stream);
    host_waits(stream->clock);
    return cudaSuccess;
}

cudaError_t wait_for_event(Event *event, bool query) {
    const char *call = query ? "cudaEventQuery" : "cudaEventSynchronize";
    LOCK;
    if (!event->recorded) return cudaSuccess;
    if (captures.count(event->capture)) return invalidate(event->capture, call, cudaErrorCapturedEvent);
    CHECK(check_captures(call));
    for (size_t i = 0; query && i < event->clock.size(); i++)
        if (!covers(host, i, event->clock[i])) return cudaErrorNotReady;
    host_waits(event->clock);
    return cudaSuccess;
}

cudaError_t wait_for_device() {
    LOCK;
    for (auto capture : captures)
        if (capture->mode != cudaStreamCaptureModeRelaxed || capture->thread == std::this_thread::get_id())
            return invalidate(capture, "cudaDeviceSynchronize", cudaErrorStreamCaptureUnsupported);
    for (auto stream : streams) host_waits(stream->clock);
    return cudaSuccess;
}

cudaError_t record(Event *event, Stream *stream) {
    LOCK;
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->recorded = true;
    event->milliseconds = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
    event->capture = stream->capture;
    if (auto capture = stream->capture) {
        if (capture->invalid) return cudaErrorStreamCaptureInvalidated;
        event->capture_id = capture->id;
        capture->clocks[stream][stream]++;
        event->captured_clock = capture->clocks[stream];
        return cudaSuccess;
    }
    advance(stream);
    event->clock = stream->clock;
    return cudaSuccess;
}

cudaError_t stream_waits(Stream *stream, Event *event) {
    const char *call = "cudaStreamWaitEvent";
    LOCK;
    if (!event->recorded) return cudaSuccess;
    if (auto capture = event->capture) {
        if (!captures.count(capture) || capture->id != event->capture_id) return cudaSuccess;
        if (stream->capture && stream->capture != capture) return cudaErrorStreamCaptureMerge;
        if (is_default(stream)) return invalidate(capture, call, cudaErrorStreamCaptureImplicit);
        stream->capture = capture;
        for (auto &known : event->captured_clock) {
            auto &time = capture->clocks[stream][known.first];
            time = std::max(time, known.second);
        }
        return cudaSuccess;
    }
    if (stream->capture) return invalidate(stream->capture, call, cudaErrorStreamCaptureIsolation);
    join(stream->clock, event->clock);
    return cudaSuccess;
}

cudaError_t begin_capture(Stream *stream, int mode) {
    LOCK;
    if (is_default(stream)) return cudaErrorStreamCaptureUnsupported;
    if (stream->capture) return cudaErrorInvalidValue;
    auto capture = new Capture;
    capture->id = next_capture++;
    capture->mode = mode;
    capture->thread = std::this_thread::get_id();
    capture->origin = stream;
    capture->clocks[stream];
    stream->capture = capture;
    captures.insert(capture);
    return cudaSuccess;
}

cudaError_t end_capture(Stream *stream, cudaGraph_t *graph) {
    LOCK;
    *graph = nullptr;
    auto capture = stream->capture;
    if (!capture) return cudaErrorInvalidValue;
    if (capture->origin != stream) return cudaErrorStreamCaptureUnmatched;
    if (capture->thread != std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed)
        return cudaErrorStreamCaptureWrongThread;
    cudaError_t result = capture->invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
    for (auto &known : capture->clocks)
        if (!result && known.second[known.first] > capture->clocks[stream][known.first])
            result = cudaErrorStreamCaptureUnjoined;
    for (auto each : streams)
        if (each->capture == capture) each->capture = nullptr;
    captures.erase(capture);
    if (!result) *graph = (cudaGraph_t) new Graph(*capture);
    return result;
}

std::map<const void *, std::string> &kernel_names() {
    // Torch's libraries register their kernels before this one's own variables are made.
    static auto names = new std::map<const void *, std::string>;
    return *names;
}
// A kernel of torch's that Python did not see: it does not run.
cudaError_t launch_of_torch(const void *kernel, Stream *stream) {
    std::string name = kernel_names()[kernel];
    return submit(stream, [name](Stream *stream) {
        LOCK;
        advance(stream);
        say("not run: %s", name.c_str());
    });
}
} // namespace

// ---- for Python
extern "C" {
void gpu_set_callbacks(LaunchCallback launch, NodeCallback node) { launch_callback = launch, node_callback = node; }
void gpu_say(const char *text) { say("%s", text); }
// What was complained of since the last call; the caller's to read until the next one.
const char *gpu_complaints() {
    LOCK;
    static std::string told;
    told.swap(complaints);
    complaints.clear();
    return told.c_str();
}
int gpu_parameters(Function *function, int *offsets_and_sizes, int most) {
    int count = function->parameters.size();
    for (int i = 0; i < std::min(count, most); i++) {
        offsets_and_sizes[2 * i] = function->parameters[i].offset;
        offsets_and_sizes[2 * i + 1] = function->parameters[i].bytes;
    }
    return count;
}
// An access of the kernel that runs now.
void gpu_access(uint64_t address, uint64_t bytes, int write, const char *what) {
    LOCK;
    if (running) access(running, running_time, address, bytes, write, what);
}
// An operator of torch's, and address, bytes and whether it is written of each tensor. Returns 0: run it now; 1: it was
// captured; or an error, as a negative number.
int gpu_node(void *handle, uint64_t id, const uint64_t *tensors, int count, const char *name) {
    auto stream = stream_of(handle);
    std::vector<uint64_t> own(tensors, tensors + 3 * count);
    std::string what = name;
    auto check = [own, what](Stream *stream) {
        LOCK;
        uint64_t time = advance(stream);
        for (size_t i = 0; i < own.size(); i += 3) access(stream, time, own[i], own[i + 1], own[i + 2], what);
    };
    if (!stream->capture) return check(stream), 0;
    cudaError_t error = submit(stream, [check, id](Stream *stream) {
        check(stream);
        node_callback(id);
    });
    return error ? -(int)error : 1;
}

// ---- the runtime
void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *kernel, char *, const char *name, int, void *, void *, void *, void *,
                            int *) {
    LOCK;
    kernel_names()[kernel] = name;
}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
char __cudaInitModule(void **) { return 1; }
struct Configuration {
    dim3 grid, block;
    size_t shared_bytes;
    void *stream;
};
static thread_local Configuration configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st *stream) {
    configuration = {grid, block, shared_bytes, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared_bytes = configuration.shared_bytes;
    *(void **)stream = configuration.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t, cudaStream_t stream) {
    return keep(launch_of_torch((void *)kernel, stream_of(stream)));
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3, dim3, void **, size_t, cudaStream_t stream) {
    return keep(launch_of_torch(kernel, stream_of(stream)));
}
cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3, dim3, void **, size_t, cudaStream_t stream) {
    return keep(launch_of_torch(kernel, stream_of(stream)));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **) {
    return keep(launch_of_torch(kernel, stream_of(config->stream)));
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) {
    function(data);
    return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned) {
    callback(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) { return *count = num_devices, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= num_devices) return keep(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { return *version = VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 1, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
    *value = attribute(which);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int) {
    static int handle;
    *pool = (cudaMemPool_t)&handle;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    snprintf(id, length, "0000:0%d:00.0", device);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return keep(wait_for_device()); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    snprintf(properties->name, sizeof properties->name, "pretended H100");
    properties->totalGlobalMem = total_memory;
    properties->major = attribute(cudaDevAttrComputeCapabilityMajor);
    properties->warpSize = attribute(cudaDevAttrWarpSize);
    properties->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    properties->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
    properties->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    properties->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    properties->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    properties->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    properties->regsPerBlock = properties->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
    for (int i = 0; i < 3; i++) {
        properties->maxThreadsDim[i] = i < 2 ? 1024 : 64;
        properties->maxGridSize[i] = attribute(cudaDevAttrMaxGridDimX + i);
    }
    properties->l2CacheSize = 50 << 20;
    properties->memoryBusWidth = 5120;
    properties->concurrentKernels = properties->unifiedAddressing = 1;
    properties->pciBusID = device + 1;
    properties->textureAlignment = 512;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int, size_t) {
    return *blocks = 2, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) {
    return *blocks = 2, cudaSuccess;
}
// Torch asks for functions that it never calls here.
static CUresult not_supported() { return CUDA_ERROR_NOT_SUPPORTED; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *result) {
    static void *self = dlopen("libcuda.so.1", RTLD_LAZY);
    *function = dlsym(self, name);
    if (!*function) *function = (void *)not_supported;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
const char *cudaGetErrorName(cudaError_t error) {
    for (auto &each : ERRORS)
        if (each.error == error) return each.name;
    return "cudaErrorUnknown";
}
const char *cudaGetErrorString(cudaError_t error) {
    for (auto &each : ERRORS)
        if (each.error == error) return each.text;
    return "unknown error";
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
    auto error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaGetSymbolAddress(void **address, const void *) {
    static char memory[1 << 16];
    *address = memory;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **address, size_t bytes) { return keep(allocate(address, bytes)); }
cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t) { return keep(allocate(address, bytes)); }
cudaError_t cudaFree(void *address) { return keep(release(address)); }
cudaError_t cudaFreeAsync(void *address, cudaStream_t) { return keep(release(address)); }
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    LOCK;
    *free_bytes = total_memory - used_memory;
    *total_bytes = total_memory;
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned) {
    CHECK(keep(check_captures("cudaHostAlloc")));
    LOCK;
    if (posix_memalign(address, 4096, std::max<size_t>(bytes, 1))) return keep(cudaErrorMemoryAllocation);
    blocks[(uintptr_t)*address] = {bytes, HOST, current_device};
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *address) {
    CHECK(keep(check_captures("cudaFreeHost")));
    LOCK;
    blocks.erase((uintptr_t)address);
    free(address);
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned) {
    LOCK;
    blocks[(uintptr_t)address] = {bytes, HOST, current_device};
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *address) {
    LOCK;
    blocks.erase((uintptr_t)address);
    return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void **device_address, void *address, unsigned) {
    return *device_address = address, cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *address) {
    LOCK;
    memset(attributes, 0, sizeof *attributes);
    auto block = block_at(address);
    Kind kind = block ? block->kind : UNKNOWN;
    attributes->type = kind == DEVICE ? cudaMemoryTypeDevice
                       : kind == HOST ? cudaMemoryTypeHost
                                      : cudaMemoryTypeUnregistered;
    attributes->device = block ? block->device : cudaInvalidDeviceId;
    attributes->devicePointer = block ? (void *)address : nullptr;
    attributes->hostPointer = kind == HOST ? (void *)address : nullptr;
    return cudaSuccess;
}

static cudaError_t copy(void *to, const void *from, size_t bytes, cudaStream_t stream, bool waits) {
    if (waits) CHECK(check_captures("cudaMemcpy"));
    return submit(stream_of(stream), [=](Stream *stream) {
        copy_now(stream, to, from, bytes, waits, "a copy of " + std::to_string(bytes));
    });
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
    return keep(copy(to, from, bytes, nullptr, true));
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    return keep(copy(to, from, bytes, stream, false));
}
cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t stream) {
    return keep(copy(to, from, bytes, stream, false));
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        CHECK(keep(copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, stream, false)));
    return cudaSuccess;
}
static cudaError_t set_memory(void *address, int value, size_t bytes, cudaStream_t stream, bool waits) {
    if (waits) CHECK(check_captures("cudaMemset"));
    return submit(stream_of(stream), [=](Stream *stream) {
        LOCK;
        access(stream, advance(stream), (uintptr_t)address, bytes, true, "a memset");
        memset(address, value, bytes);
        if (waits) host_waits(stream->clock);
    });
}
cudaError_t cudaMemset(void *address, int value, size_t bytes) {
    return keep(set_memory(address, value, bytes, nullptr, true));
}
cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t stream) {
    return keep(set_memory(address, value, bytes, stream, false));
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = (cudaEvent_t) new Event;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
// Streams and events are few, and may still be named by others.
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = std::max(1e-3, ((Event *)end)->milliseconds - ((Event *)start)->milliseconds);
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return keep(wait_for_event((Event *)event, true)); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return keep(wait_for_event((Event *)event, false)); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return keep(record((Event *)event, stream_of(stream)));
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = (cudaStream_t)new_stream(flags, priority, current_device);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    return *priority = stream_of(stream)->priority, cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return keep(wait_for_stream(stream_of(stream), true)); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return keep(wait_for_stream(stream_of(stream), false)); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    return keep(stream_waits(stream_of(stream), (Event *)event));
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    return keep(begin_capture(stream_of(stream), mode));
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    return keep(end_capture(stream_of(stream), graph));
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
    LOCK;
    auto capture = stream_of(stream)->capture;
    *status = !capture           ? cudaStreamCaptureStatusNone
              : capture->invalid ? cudaStreamCaptureStatusInvalidated
                                 : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    LOCK;
    auto capture = stream_of(stream)->capture;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = nullptr;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
    int before = thread_mode;
    thread_mode = *mode;
    *mode = (cudaStreamCaptureMode)before;
    return cudaSuccess;
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char *, unsigned) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete (Graph *)graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete (Graph *)graph, cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    if (!nodes) *count = ((Graph *)graph)->nodes.size();
    return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t *, cudaGraphEdgeData *, size_t *count) {
    return *count = 0, cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long) {
    *executable = (cudaGraphExec_t) new Graph(*(Graph *)graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t handle) {
    auto stream = stream_of(handle);
    if (stream->capture) return keep(invalidate(stream->capture, "cudaGraphLaunch", cudaErrorStreamCaptureUnsupported));
    for (auto &node : ((Graph *)graph)->nodes) node(stream);
    return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- the driver, as torch and Triton use it
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) {
    *device = index;
    return index < num_devices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetCount(int *count) { return *count = num_devices, CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int length, CUdevice) {
    snprintf(name, length, "pretended H100");
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice) {
    return *value = attribute(which), CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)streams[current_device], CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = current_device, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return *context = (CUcontext)streams[device], CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
    return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
    return *text = cudaGetErrorString((cudaError_t)error), CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char **name) {
    return *name = cudaGetErrorName((cudaError_t)error), CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute, CUdeviceptr address) {
    LOCK;
    if (!block_at((void *)address)) return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)image;
    return (CUresult)check_captures("cuModuleLoadData");
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned, CUjit_option *, void **) {
    return cuModuleLoadData(module, image);
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule image, const char *name) {
    auto found = new Function{name};
    read_parameters(found, (const char *)image);
    *function = (CUfunction)found;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 512 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 128 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return (CUresult)cudaStreamIsCapturing(stream, (cudaStreamCaptureStatus *)status);
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    return (CUresult)cudaThreadExchangeStreamCaptureMode((cudaStreamCaptureMode *)mode);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **parameters, void **) {
    auto function = (Function *)handle;
    std::vector<uint8_t> bytes;
    for (size_t i = 0; i < function->parameters.size(); i++) {
        auto &parameter = function->parameters[i];
        bytes.resize(std::max<size_t>(bytes.size(), parameter.offset + parameter.bytes));
        memcpy(&bytes[parameter.offset], parameters[i], parameter.bytes);
    }
    std::vector<unsigned> grid{config->gridDimX, config->gridDimY, config->gridDimZ};
    unsigned block = config->blockDimX, shared_bytes = config->sharedMemBytes;
    return (CUresult)submit(stream_of(config->hStream), [=](Stream *stream) {
        {
            LOCK;
            running = stream;
            running_time = advance(stream);
        }
        launch_callback(function, grid.data(), block, shared_bytes, bytes.data(), bytes.size());
        running = nullptr;
    });
}
}
