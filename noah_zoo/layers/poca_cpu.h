// POCA and its gradients for one kind of processor: poca_cpu.cpp includes this for each, in a namespace of its own,
// with what differs as macros: LANES of a vector, SMALL and LARGE numbers of vectors that a panel has, SUMS that the
// registers hold.
//
// A panel of maps at a time: their kernels are transposed once (pack), and per image two small matrix products
// give their scores and values at every position (embed), of which the softmax and the sum are taken while they lie in
// the nearest cache (attend). Backward computes both again, turns them into their gradients (derive), and adds their
// products with features to the gradients of the kernels, which stay packed until the end, and with kernels to those of
// the features. A task has the images of a chunk and the channels of a group, or of all of them, so that no two tasks
// add to the same numbers, and the order of every sum is the same on any number of threads.

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

// 4 x 4 floats: pairs, then pairs of pairs
inline void transpose(Four (&rows)[4]) {
    Four pairs[4];
    for (int m = 0; m < 4; m += 2) {
        pairs[m] = SHUFFLE(rows[m], rows[m + 1], 0, 4, 1, 5);
        pairs[m + 1] = SHUFFLE(rows[m], rows[m + 1], 2, 6, 3, 7);
    }
    for (int m = 0; m < 2; m++) {
        rows[2 * m] = SHUFFLE(pairs[m], pairs[m + 2], 0, 1, 4, 5);
        rows[2 * m + 1] = SHUFFLE(pairs[m], pairs[m + 2], 2, 3, 6, 7);
    }
}

// (maps, depth) -> (depth, V * LANES); maps that are missing repeat the first
template <int V>
void pack(const float *weight, ptrdiff_t maps, ptrdiff_t depth, float *packed) {
    constexpr int WIDTH = V * LANES;
    for (int some = 0; some < WIDTH; some += 4) {
        const float *row[4];
        for (int m = 0; m < 4; m++) row[m] = weight + (some + m < maps ? some + m : 0) * depth;
        float *to = packed + some;
        ptrdiff_t c = 0;
        for (; c + 4 <= depth; c += 4) {
            Four four[4];
            for (int m = 0; m < 4; m++) memcpy(&four[m], row[m] + c, sizeof(Four));
            transpose(four);
            for (int m = 0; m < 4; m++) memcpy(to + (c + m) * WIDTH, &four[m], sizeof(Four));
        }
        for (; c < depth; c++)
            for (int m = 0; m < 4; m++) to[c * WIDTH + m] = row[m][c];
    }
}

// (rows, V * LANES) -> (maps, stride)
template <int V>
void unpack(const float *packed, ptrdiff_t rows, ptrdiff_t maps, float *to, ptrdiff_t stride) {
    constexpr int WIDTH = V * LANES;
    for (ptrdiff_t some = 0; some < maps; some += 4) {
        ptrdiff_t row = 0, end = std::min<ptrdiff_t>(some + 4, maps);
        for (; end == some + 4 && row + 4 <= rows; row += 4) {
            Four four[4];
            for (int m = 0; m < 4; m++) memcpy(&four[m], packed + (row + m) * WIDTH + some, sizeof(Four));
            transpose(four);
            for (int m = 0; m < 4; m++) memcpy(to + (some + m) * stride + row, &four[m], sizeof(Four));
        }
        for (; row < rows; row++)
            for (ptrdiff_t m = some; m < end; m++) to[m * stride + row] = packed[row * WIDTH + m];
    }
}

// COUNT rows of a product of x (rows, depth) and a packed panel (depth, V * LANES); added to out but for the first
template <int V, int COUNT>
void multiply_rows(const float *x, ptrdiff_t row_stride, ptrdiff_t depth_stride, const float *packed, ptrdiff_t depth,
                   bool first, float *out) {
    Vector sums[COUNT][V];
#pragma GCC unroll 24
    for (int row = 0; row < COUNT; row++)
        for (int v = 0; v < V; v++) sums[row][v] = first ? Vector{} : ((Vector *)out)[row * V + v];
    for (ptrdiff_t d = 0; d < depth; d++, x += depth_stride, packed += V * LANES) {
        Vector right[V];
        for (int v = 0; v < V; v++) right[v] = ((const Vector *)packed)[v];
#pragma GCC unroll 24
        for (int row = 0; row < COUNT; row++)
            for (int v = 0; v < V; v++) sums[row][v] += x[row * row_stride] * right[v];
    }
#pragma GCC unroll 24
    for (int row = 0; row < COUNT; row++)
        for (int v = 0; v < V; v++) ((Vector *)out)[row * V + v] = sums[row][v];
}

template <int V, int... COUNT>
constexpr auto multiplies(std::integer_sequence<int, COUNT...>) {
    return std::array{multiply_rows<V, COUNT + 1>...};
}

// All rows; next is what will be packed next, and is fetched meanwhile
template <int V>
void multiply(const float *x, ptrdiff_t rows, ptrdiff_t row_stride, ptrdiff_t depth_stride, const float *packed,
              ptrdiff_t depth, bool first, float *out, const float *next = nullptr) {
    constexpr int ROWS = SUMS / V, WIDTH = V * LANES;
    constexpr auto MULTIPLY_ROWS = multiplies<V>(std::make_integer_sequence<int, ROWS>());
    ptrdiff_t fetched = 0;
    for (ptrdiff_t d = 0; d < depth; d += DEPTH) {
        ptrdiff_t step = std::min(depth - d, DEPTH);
        for (ptrdiff_t row = 0, steps = (rows + ROWS - 1) / ROWS, count; steps > 0; steps--, row += count) {
            count = (rows - row) / steps;  // as even as it goes: 49 rows are five times 5 and four times 6
            for (; next && fetched < d + step * (row + count) / rows; fetched++)
                __builtin_prefetch(next + fetched * WIDTH, 0, 2);
            MULTIPLY_ROWS[count - 1](x + d * depth_stride + row * row_stride, row_stride, depth_stride,
                                     packed + d * WIDTH, step, first && d == 0, out + row * WIDTH);
        }
    }
}

// COUNT rows of a product of left (rows, depth) and right (depth, width), width at most V * LANES; added to out or not
template <int V, int COUNT>
void add_rows(const float *left, ptrdiff_t left_stride, const float *right, ptrdiff_t right_stride, ptrdiff_t depth,
              float *out, ptrdiff_t out_stride, ptrdiff_t width, bool add) {
    Vector sums[COUNT][V];
    bool whole = width == V * LANES;
    for (int row = 0; row < COUNT; row++)
        for (int v = 0; v < V; v++) sums[row][v] = add && whole ? ((Unaligned *)(out + row * out_stride))[v] : Vector{};
    if (add && !whole)
        for (int row = 0; row < COUNT; row++)
            for (ptrdiff_t i = 0; i < width; i++) ((float *)sums[row])[i] = out[row * out_stride + i];
    for (ptrdiff_t d = 0; d < depth; d++, right += right_stride) {
        Vector columns[V];
        for (int v = 0; v < V; v++) columns[v] = ((const Unaligned *)right)[v];
#pragma GCC unroll 24
        for (int row = 0; row < COUNT; row++)
            for (int v = 0; v < V; v++) sums[row][v] += left[row * left_stride + d] * columns[v];
    }
    for (int row = 0; row < COUNT; row++) {
        if (whole)
            for (int v = 0; v < V; v++) ((Unaligned *)(out + row * out_stride))[v] = sums[row][v];
        else
            memcpy(out + row * out_stride, sums[row], width * sizeof(float));
    }
}

template <int V, int... COUNT>
constexpr auto adds(std::integer_sequence<int, COUNT...>) {
    return std::array{add_rows<V, COUNT + 1>...};
}

// All rows of a product of left (rows, depth) and right (depth, width), width at most V * LANES
template <int V>
void add_block(const float *left, ptrdiff_t left_stride, const float *right, ptrdiff_t right_stride, ptrdiff_t depth,
               float *out, ptrdiff_t rows, ptrdiff_t out_stride, ptrdiff_t width, bool add) {
    constexpr int ROWS = SUMS / V;
    constexpr auto ADD_ROWS = adds<V>(std::make_integer_sequence<int, ROWS>());
    for (ptrdiff_t row = 0, steps = (rows + ROWS - 1) / ROWS, count; steps > 0; steps--, row += count) {
        count = (rows - row) / steps;
        ADD_ROWS[count - 1](left + row * left_stride, left_stride, right, right_stride, depth, out + row * out_stride,
                            out_stride, width, add);
    }
}

// The columns from whole on, at most V * LANES, beyond which there may be no memory: a block that ends with them, and
// adds nothing to the columns before, or leaves them to be written
template <int V>
void add_last(const float *left, ptrdiff_t left_stride, const float *right, ptrdiff_t right_stride, ptrdiff_t depth,
              float *out, ptrdiff_t rows, ptrdiff_t out_stride, ptrdiff_t width, ptrdiff_t whole, bool add) {
    constexpr int WIDTH = V * LANES;
    alignas(64) float last[LARGE * LANES * WIDTH];
    ptrdiff_t first = std::max<ptrdiff_t>(width - WIDTH, 0);
    for (ptrdiff_t d = 0; d < depth; d++)
        for (ptrdiff_t i = 0, column = first; i < WIDTH; i++, column++)
            last[d * WIDTH + i] = column >= whole && column < width ? right[d * right_stride + column] : 0.f;
    add_block<V>(left, left_stride, last, WIDTH, depth, out + first, rows, out_stride, width - first, add);
}

// All of out (rows, width); depth is at most a panel
inline void add_product(const float *left, ptrdiff_t left_stride, const float *right, ptrdiff_t right_stride,
                        ptrdiff_t depth, float *out, ptrdiff_t rows, ptrdiff_t out_stride, ptrdiff_t width, bool add) {
    constexpr int WIDTH = LARGE * LANES;
    ptrdiff_t rest = width % WIDTH, whole = width - rest;
    if (rest > SMALL * LANES)
        add_last<LARGE>(left, left_stride, right, right_stride, depth, out, rows, out_stride, width, whole, add);
    else if (rest)
        add_last<SMALL>(left, left_stride, right, right_stride, depth, out, rows, out_stride, width, whole, add);
    for (ptrdiff_t column = 0; column < whole; column += WIDTH)
        add_block<LARGE>(left, left_stride, right + column, right_stride, depth, out + column, rows, out_stride, WIDTH,
                         add);
}

inline Vector larger(Vector a, Vector b) { return LARGER(a, b); }  // b if one of them is NaN
inline Vector smaller(Vector a, Vector b) { return SMALLER(a, b); }

inline bool safe(Vector sum) {  // whether no lane came near the ends of the number range
    Bits in_range = (Bits)((sum > 1e-20f) & (sum < 1e20f));
    uint32_t all = in_range[0];
    for (int lane = 1; lane < LANES; lane++) all &= in_range[lane];
    return all;
}

// exp(x) to 2e-7: 2^n times a polynomial (Cephes' expf) on [-ln 2 / 2, ln 2 / 2]; NaN stays NaN, ends are cut off
inline Vector exponential(Vector x) {
    x = larger(Vector{} - 87.f, smaller(Vector{} + 88.f, x));
    Vector shifted = x * 1.44269504f + 12582912.f;  // n in the last bits, by rounding
    Vector n = shifted - 12582912.f;
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * (x * x) + x + 1.f;
    return y * (Vector)(((Bits)shifted << 23) + (127 << 23));
}

inline Bits mix(Bits x) {  // whose bits depend on all bits of x
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// Dropout of a panel of an image: a number per map and position, made of these and the seed alone
template <int V>
struct Dropout {
    Bits base[V], kept;
    Vector scale;

    Dropout(const Call &call, ptrdiff_t image, ptrdiff_t first_map) {
        uint32_t high = call.seed >> 32;
        for (int v = 0; v < V; v++) {
            for (int lane = 0; lane < LANES; lane++) base[v][lane] = first_map + v * LANES + lane;
            base[v] = mix(mix(base[v] + (uint32_t)call.seed) ^ ((uint32_t)image * 0x9e3779b9u + high));
        }
        kept = Bits{} + (uint32_t)((1.f - call.drop_rate) * (1 << 24));
        scale = Vector{} + 1.f / (1.f - call.drop_rate);
    }

    Vector operator()(ptrdiff_t position, int v) const {  // 0, or what keeps the mean
        Bits number = mix(base[v] + (uint32_t)position * 0x9e3779b9u) >> 8;
        return (Vector)((Bits)(number < kept) & (Bits)scale);
    }
};

// Adds the bias to values, and drops some
template <int V>
void drop(const Dropout<V> &dropout, const float *bias, ptrdiff_t maps, float *values, ptrdiff_t length) {
    alignas(64) float biases[V * LANES] = {};
    if (bias) memcpy(biases, bias, maps * sizeof(float));
    for (ptrdiff_t l = 0; l < length; l++)
        for (int v = 0; v < V; v++) {
            Vector &value = ((Vector *)values)[l * V + v];
            value = (value + ((Vector *)biases)[v]) * dropout(l, v);
        }
}

// One vector's maps of scores and values (length, V * LANES): attended values; total is the sum of the exponentials,
// which are kept (length, LANES) if there is where. Scores are shifted by their largest only if the sums show that
// there is need.
template <int V>
inline Vector attend(const float *scores, const float *values, ptrdiff_t length, Vector &total,
                     Vector *kept = nullptr) {
    const Vector *score = (const Vector *)scores, *value = (const Vector *)values;
    Vector shift = {}, sum;
    for (bool shifted : {false, true}) {
        total = sum = Vector{};
        for (ptrdiff_t l = 0; l < length; l++) {
            Vector attention = exponential(score[l * V] - shift);
            if (kept) kept[l] = attention;
            total += attention;
            sum += attention * value[l * V];
        }
        if (shifted || safe(total)) break;
        shift = *score;
        for (ptrdiff_t l = 1; l < length; l++) shift = larger(score[l * V], shift);
    }
    return sum / total;
}

// Scores and values -> their gradients, in their place; those of the bias are added to dbias
template <int V>
void derive(float *scores, float *values, ptrdiff_t length, const float *grad, const Dropout<V> *dropout, float *dbias,
            float *buffer) {
    Vector *attention = (Vector *)buffer;
    for (int v = 0; v < V; v++) {
        Vector *score = (Vector *)scores + v, *value = (Vector *)values + v, total, sum = {};
        Vector out = attend<V>(scores + v * LANES, values + v * LANES, length, total, attention);
        Vector scale = ((const Vector *)grad)[v] / total;
        for (ptrdiff_t l = 0; l < length; l++) {
            Vector dvalue = attention[l] * scale;
            score[l * V] = dvalue * (value[l * V] - out);
            if (dropout) dvalue *= (*dropout)(l, v);
            value[l * V] = dvalue;
            sum += dvalue;
        }
        ((Vector *)dbias)[v] += dropout ? sum : ((const Vector *)grad)[v];  // the attention sums to 1
    }
}

// What both passes know of a group's maps: where its key and its value read, and its kernels
template <int V>
struct Panel {
    ptrdiff_t maps, row, key_channel, value_channel;
    const float *key_weight, *value_weight;
    float *key, *value;  // packed

    Panel(const Call &call, ptrdiff_t group, ptrdiff_t map, float *buffer) {
        maps = std::min<ptrdiff_t>(call.maps - map, V * LANES), row = group * call.maps + map;
        key_channel = group * call.key_depth;
        value_channel = call.channels - (call.groups - group) * call.value_depth;
        key_weight = call.key_weight + row * call.key_depth;
        value_weight = call.value_weight + row * call.value_depth;
        key = buffer, value = key + call.key_depth * V * LANES;
        pack<V>(key_weight, maps, call.key_depth, key);
        pack<V>(value_weight, maps, call.value_depth, value);
    }

    // Scores and values of an image at every position
    void embed(const Call &call, const float *x, ptrdiff_t image, float *scores, float *values) const {
        multiply<V>(x + key_channel * call.channel_stride, call.length, call.position_stride, call.channel_stride, key,
                    call.key_depth, true, scores, key_weight + maps * call.key_depth);
        multiply<V>(x + value_channel * call.channel_stride, call.length, call.position_stride, call.channel_stride,
                    value, call.value_depth, true, values, value_weight + maps * call.value_depth);
        if (call.drop_rate)
            drop(Dropout<V>(call, image, row), call.value_bias ? call.value_bias + row : nullptr, maps, values,
                 call.length);
    }
};

constexpr ptrdiff_t PANEL = LARGE * LANES;  // maps of a panel, but for the last of a group, which may be small

inline ptrdiff_t panels_of(const Call &call) { return (call.maps + PANEL - 1) / PANEL; }

inline bool is_small(const Call &call, ptrdiff_t map) { return call.maps - map <= SMALL * LANES; }

// So many images as the second nearest cache holds; of rows of all channels, other groups' lie in the same lines
inline ptrdiff_t near_images(const Call &call) {
    ptrdiff_t channels = call.channel_stride == 1 ? call.channels : call.key_depth + call.value_depth;
    return std::max<ptrdiff_t>(NEAR / (call.length * channels), 1);
}

template <int V>
void forward_panel(const Call &call, ptrdiff_t group, ptrdiff_t map, ptrdiff_t begin, ptrdiff_t end, float *buffer) {
    Panel<V> panel(call, group, map, buffer);
    constexpr int WIDTH = V * LANES;
    float *scores = buffer + (call.key_depth + call.value_depth) * WIDTH, *values = scores + call.length * WIDTH;
    Vector attended[V], total;
    for (ptrdiff_t image = begin; image < end; image++) {
        panel.embed(call, call.x + image * call.image_stride, image, scores, values);
        for (int v = 0; v < V; v++)
            attended[v] = attend<V>(scores + v * LANES, values + v * LANES, call.length, total);
        memcpy(call.out + image * call.groups * call.maps + panel.row, attended, panel.maps * sizeof(float));
    }
}

// Tasks are panels of all groups, for some images at a time
inline void forward(const Call &call, float *buffer) {
    ptrdiff_t images = near_images(call), panels = panels_of(call), all = call.groups * panels;
    ptrdiff_t tasks = (call.batch + images - 1) / images * all;
#pragma omp for schedule(dynamic, 1)
    for (ptrdiff_t task = 0; task < tasks; task++) {
        ptrdiff_t begin = task / all * images, end = std::min(begin + images, call.batch);
        ptrdiff_t group = task % all / panels, map = task % panels * PANEL;
        (is_small(call, map) ? forward_panel<SMALL> : forward_panel<LARGE>)(call, group, map, begin, end, buffer);
    }
}

// Adds the products of a panel's gradients at all positions of an image with its kernels to the gradients of features
template <int V>
void add_features(const Call &call, const float *dmaps, const float *weight, const float *packed, ptrdiff_t maps,
                  ptrdiff_t depth, bool add, float *dx, float *buffer) {
    if (call.channels_first) {
        ptrdiff_t stride = (call.length + LANES - 1) / LANES * LANES;
        unpack<V>(dmaps, call.length, maps, buffer, stride);
        add_product(packed, V * LANES, buffer, stride, maps, dx, depth, call.length, call.length, add);
    } else {
        add_product(dmaps, V * LANES, weight, depth, maps, dx, call.length, call.channels, depth, add);
    }
}

// Gradients of a panel's kernels and bias, packed, from these images, with the first of which they may begin
template <int V>
void backward_panel(const Call &call, ptrdiff_t group, ptrdiff_t map, ptrdiff_t begin, ptrdiff_t end, bool first,
                    float *dkey, float *buffer) {
    constexpr int WIDTH = V * LANES;
    ptrdiff_t dx_channel = call.channels_first ? call.length : 1;
    Panel<V> panel(call, group, map, buffer);
    float *dvalue = dkey + call.key_depth * WIDTH, *dbias = dvalue + call.value_depth * WIDTH;
    float *scores = buffer + (call.key_depth + call.value_depth) * WIDTH, *values = scores + call.length * WIDTH;
    float *more = values + call.length * WIDTH;
    alignas(64) float grad[WIDTH] = {};
    if (first) memset(dbias, 0, sizeof(grad));
    for (ptrdiff_t image = begin; image < end; image++, first = false) {
        const float *x = call.x + image * call.image_stride;
        panel.embed(call, x, image, scores, values);
        memcpy(grad, call.grad + image * call.groups * call.maps + panel.row, panel.maps * sizeof(float));
        Dropout<V> dropout(call, image, panel.row);
        derive<V>(scores, values, call.length, grad, call.drop_rate ? &dropout : nullptr, dbias, more);
        if (call.dkey_weight) {
            multiply<V>(x + panel.key_channel * call.channel_stride, call.key_depth, call.channel_stride,
                        call.position_stride, scores, call.length, first, dkey);
            multiply<V>(x + panel.value_channel * call.channel_stride, call.value_depth, call.channel_stride,
                        call.position_stride, values, call.length, first, dvalue);
        }
        if (call.dx) {
            float *dx = call.dx + image * call.length * call.channels;
            add_features<V>(call, scores, panel.key_weight, panel.key, panel.maps, call.key_depth, map > 0,
                            dx + panel.key_channel * dx_channel, more);
            add_features<V>(call, values, panel.value_weight, panel.value, panel.maps, call.value_depth,
                            map > 0 || call.value_adds, dx + panel.value_channel * dx_channel, more);
        }
    }
}

// The sum of all chunks' gradients of a panel, unpacked
template <int V>
void sum_panel(const Call &call, ptrdiff_t group, ptrdiff_t map, float *sum, ptrdiff_t stride) {
    constexpr int WIDTH = V * LANES;
    ptrdiff_t depth = call.key_depth + call.value_depth, row = group * call.maps + map;
    ptrdiff_t maps = std::min<ptrdiff_t>(call.maps - map, WIDTH);
    for (ptrdiff_t chunk = 1; chunk < call.chunks; chunk++)
        for (ptrdiff_t i = 0; i < (depth + 1) * V; i++) ((Vector *)sum)[i] += ((Vector *)(sum + chunk * stride))[i];
    unpack<V>(sum, call.key_depth, maps, call.dkey_weight + row * call.key_depth, call.key_depth);
    unpack<V>(sum + call.key_depth * WIDTH, call.value_depth, maps, call.dvalue_weight + row * call.value_depth,
              call.value_depth);
    if (call.dvalue_bias) memcpy(call.dvalue_bias + row, sum + depth * WIDTH, maps * sizeof(float));
}

// Tasks are chunks of images, of a group or, if those of other groups lie in the same lines, of all of them; then the
// packed gradients of the kernels are put together
inline void backward(const Call &call, float *buffer, float *packed_grads) {
    ptrdiff_t panels = panels_of(call), near = near_images(call), together = call.channel_stride == 1 ? call.groups : 1;
    ptrdiff_t size = (call.key_depth + call.value_depth + 1) * PANEL, all = call.groups * panels;  // packed, bias last
    ptrdiff_t parts = call.groups / together;
#pragma omp for schedule(dynamic, 1)
    for (ptrdiff_t task = 0; task < call.chunks * parts; task++) {
        ptrdiff_t chunk = task / parts, some = task % parts * together * panels;
        ptrdiff_t first = call.batch * chunk / call.chunks, last = call.batch * (chunk + 1) / call.chunks;
        for (ptrdiff_t begin = first; begin < last; begin += near)
            for (ptrdiff_t p = some; p < some + together * panels; p++) {
                ptrdiff_t map = p % panels * PANEL;
                (is_small(call, map) ? backward_panel<SMALL> : backward_panel<LARGE>)(
                    call, p / panels, map, begin, std::min(begin + near, last), begin == first,
                    packed_grads + (chunk * all + p) * size, buffer);
            }
    }
    if (!call.dkey_weight) return;
#pragma omp for schedule(dynamic, 1)
    for (ptrdiff_t p = 0; p < all; p++) {
        ptrdiff_t map = p % panels * PANEL;
        (is_small(call, map) ? sum_panel<SMALL> : sum_panel<LARGE>)(
            call, p / panels, map, packed_grads + p * size, all * size);
    }
}

// A team of threads, each with a buffer; gives 0, or -1 if there is no memory
inline int run(const Call &call) {
    ptrdiff_t depth = call.key_depth + call.value_depth;
    ptrdiff_t floats = ((depth + 3 * call.length + LANES) * PANEL + 15) / 16 * 16;  // of a thread, aligned
    float *packed_grads = nullptr;
    if (call.grad) {
        packed_grads = allocate(call.chunks * call.groups * panels_of(call) * (depth + 1) * PANEL);
        if (!packed_grads) return -1;
    }
    float *buffers = allocate(call.threads * floats);
    if (buffers) {
#pragma omp parallel num_threads(call.threads)
        {
            float *buffer = buffers + omp_get_thread_num() * floats;
            if (call.grad)
                backward(call, buffer, packed_grads);
            else
                forward(call, buffer);
        }
    }
    int result = buffers ? 0 : -1;
    release(buffers);
    release(packed_grads);
    return result;
}
