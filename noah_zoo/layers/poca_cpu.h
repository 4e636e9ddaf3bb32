// POCA and its gradients for one kind of processor: poca_cpu.cpp includes this for each, in a namespace of its own,
// with what differs as macros: LANES of a vector, SMALL and LARGE numbers of vectors that a panel has, ROWS at a time.
//
// A panel of maps at a time: their kernels are transposed once (pack), and per image two small matrix products
// give their scores and values at every position (embed), of which the softmax and the sum are taken while they lie in
// the nearest cache (attend). Backward computes both again, turns them into their gradients (derive), and adds their
// products with features to the gradients of the kernels, which stay packed until the end, and with kernels to those of
// the features. A task has the images of a chunk and the channels of a group, so that no two tasks add to the same
// numbers, and the order of every sum is the same on any number of threads.

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

// (maps, depth) -> (depth, V * LANES); maps that are missing repeat the first
template <int V>
void pack(const float *weight, ptrdiff_t maps, ptrdiff_t depth, float *packed) {
    constexpr int PANEL = V * LANES;
    for (int some = 0; some < PANEL; some += 4) {
        const float *row[4];
        for (int m = 0; m < 4; m++) row[m] = weight + (some + m < maps ? some + m : 0) * depth;
        float *to = packed + some;
        ptrdiff_t c = 0;
        for (; c + 4 <= depth; c += 4) {  // 4 x 4 floats: pairs, then pairs of pairs
            Four a[4], b[4];
            for (int m = 0; m < 4; m++) memcpy(&a[m], row[m] + c, sizeof(Four));
            for (int m = 0; m < 4; m += 2) {
                b[m] = SHUFFLE(a[m], a[m + 1], 0, 4, 1, 5);
                b[m + 1] = SHUFFLE(a[m], a[m + 1], 2, 6, 3, 7);
            }
            for (int m = 0; m < 2; m++) {
                a[2 * m] = SHUFFLE(b[m], b[m + 2], 0, 1, 4, 5);
                a[2 * m + 1] = SHUFFLE(b[m], b[m + 2], 2, 3, 6, 7);
            }
            for (int m = 0; m < 4; m++) memcpy(to + (c + m) * PANEL, &a[m], sizeof(Four));
        }
        for (; c < depth; c++)
            for (int m = 0; m < 4; m++) to[c * PANEL + m] = row[m][c];
    }
}

// COUNT rows of a product of x (rows, depth) and a packed panel (depth, V * LANES); added to out but for the first
template <int V, int COUNT>
void multiply_rows(const float *x, ptrdiff_t row_stride, ptrdiff_t depth_stride, const float *packed, ptrdiff_t depth,
                   bool first, float *out) {
    Vector sums[COUNT][V];
#pragma GCC unroll 16
    for (int row = 0; row < COUNT; row++)
        for (int v = 0; v < V; v++) sums[row][v] = first ? Vector{} : ((Vector *)out)[row * V + v];
    for (ptrdiff_t d = 0; d < depth; d++, x += depth_stride, packed += V * LANES) {
        Vector right[V];
        for (int v = 0; v < V; v++) right[v] = ((const Vector *)packed)[v];
#pragma GCC unroll 16
        for (int row = 0; row < COUNT; row++)
            for (int v = 0; v < V; v++) sums[row][v] += x[row * row_stride] * right[v];
    }
#pragma GCC unroll 16
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
    constexpr auto MULTIPLY_ROWS = multiplies<V>(std::make_integer_sequence<int, ROWS>());
    constexpr int PANEL = V * LANES;
    ptrdiff_t fetched = 0;
    for (ptrdiff_t d = 0; d < depth; d += DEPTH) {
        ptrdiff_t step = std::min(depth - d, DEPTH);
        for (ptrdiff_t row = 0, steps = (rows + ROWS - 1) / ROWS, count; steps > 0; steps--, row += count) {
            count = (rows - row) / steps;  // as even as it goes: 49 rows are five times 5 and four times 6
            for (; next && fetched < d + step * (row + count) / rows; fetched++)
                __builtin_prefetch(next + fetched * PANEL, 0, 2);
            MULTIPLY_ROWS[count - 1](x + d * depth_stride + row * row_stride, row_stride, depth_stride,
                                     packed + d * PANEL, step, first && d == 0, out + row * PANEL);
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
#pragma GCC unroll 16
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

// All of out (rows, width), V * LANES columns at a time; depth is at most a panel
template <int V>
void add_columns(const float *left, ptrdiff_t left_stride, const float *right, ptrdiff_t right_stride, ptrdiff_t depth,
                 float *out, ptrdiff_t rows, ptrdiff_t out_stride, ptrdiff_t width, bool add) {
    constexpr auto ADD_ROWS = adds<V>(std::make_integer_sequence<int, ROWS>());
    constexpr int WIDTH = V * LANES;
    alignas(64) float last[LARGE * LANES * WIDTH];
    for (ptrdiff_t column = 0; column < width; column += WIDTH) {
        ptrdiff_t here = std::min<ptrdiff_t>(width - column, WIDTH), stride = right_stride;
        const float *columns = right + column;
        if (here < WIDTH) {  // what is beyond may be no memory
            if (V > SMALL && here <= SMALL * LANES)
                return add_columns<SMALL>(left, left_stride, columns, right_stride, depth, out + column, rows, out_stride,
                                      here, add);
            for (ptrdiff_t d = 0; d < depth; d++) {
                memset(last + d * WIDTH, 0, WIDTH * sizeof(float));
                memcpy(last + d * WIDTH, columns + d * right_stride, here * sizeof(float));
            }
            columns = last;
            stride = WIDTH;
        }
        for (ptrdiff_t row = 0, steps = (rows + ROWS - 1) / ROWS, count; steps > 0; steps--, row += count) {
            count = (rows - row) / steps;
            ADD_ROWS[count - 1](left + row * left_stride, left_stride, columns, stride, depth,
                                out + row * out_stride + column, out_stride, here, add);
        }
    }
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

// One vector's maps of scores and values (length, V * LANES): attended values; scores become exponentials and total
// their sum if keep. Scores are shifted by their largest only if the sums show that there is need.
template <int V, bool keep>
inline Vector attend(float *scores, const float *values, ptrdiff_t length, Vector &total) {
    Vector *score = (Vector *)scores, shift = {}, sum;
    const Vector *value = (const Vector *)values;
    for (bool shifted : {false, true}) {
        total = sum = Vector{};
        for (ptrdiff_t l = 0; l < length; l++) {
            Vector attention = exponential(score[l * V] - shift);
            total += attention;
            sum += attention * value[l * V];
        }
        if (shifted || safe(total)) break;
        shift = *score;
        for (ptrdiff_t l = 1; l < length; l++) shift = larger(score[l * V], shift);
    }
    if (keep)
        for (ptrdiff_t l = 0; l < length; l++) score[l * V] = exponential(score[l * V] - shift);
    return sum / total;
}

// Scores and values -> their gradients, in their place; those of the bias are added to dbias
template <int V>
void derive(float *scores, float *values, ptrdiff_t length, const float *grad, const Dropout<V> *dropout,
            float *dbias) {
    for (int v = 0; v < V; v++) {
        Vector *score = (Vector *)scores + v, *value = (Vector *)values + v, total, sum = {};
        Vector out = attend<V, true>(scores + v * LANES, values + v * LANES, length, total);
        Vector scale = ((const Vector *)grad)[v] / total;
        for (ptrdiff_t l = 0; l < length; l++) {
            Vector dvalue = score[l * V] * scale;
            score[l * V] = dvalue * (value[l * V] - out);
            if (dropout) dvalue *= (*dropout)(l, v);
            value[l * V] = dvalue;
            sum += dvalue;
        }
        ((Vector *)dbias)[v] += dropout ? sum : ((const Vector *)grad)[v];  // the attention sums to 1
    }
}

// (length, V * LANES) -> (maps, stride)
template <int V>
void transpose(const float *from, ptrdiff_t length, ptrdiff_t maps, float *to, ptrdiff_t stride) {
    for (ptrdiff_t l = 0; l < length; l++)
        for (ptrdiff_t m = 0; m < maps; m++) to[m * stride + l] = from[l * V * LANES + m];
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

template <int V>
ptrdiff_t panels_of(const Call &call) {
    return (call.maps + V * LANES - 1) / (V * LANES);
}

ptrdiff_t near_images(const Call &call) {
    return std::max<ptrdiff_t>(NEAR / (call.length * (call.key_depth + call.value_depth)), 1);
}

// Tasks are panels of all groups, for so many images at a time as the second nearest cache holds
template <int V>
void forward(const Call &call, float *buffer) {
    float *scores = buffer + (call.key_depth + call.value_depth) * V * LANES;
    float *values = scores + call.length * V * LANES, *attended = values + call.length * V * LANES;
    ptrdiff_t images = near_images(call), panels = panels_of<V>(call), all = call.groups * panels;
    ptrdiff_t tasks = (call.batch + images - 1) / images * all;
#pragma omp for schedule(dynamic, 1)
    for (ptrdiff_t task = 0; task < tasks; task++) {
        ptrdiff_t image = task / all * images, end = std::min(image + images, call.batch);
        Panel<V> panel(call, task % all / panels, task % panels * V * LANES, buffer);
        for (; image < end; image++) {
            panel.embed(call, call.x + image * call.image_stride, image, scores, values);
            Vector total;
            for (int v = 0; v < V; v++)
                ((Vector *)attended)[v] = attend<V, false>(scores + v * LANES, values + v * LANES, call.length, total);
            memcpy(call.out + image * call.groups * call.maps + panel.row, attended, panel.maps * sizeof(float));
        }
    }
}

// Adds the products of a panel's gradients at all positions of an image with its kernels to the gradients of features
template <int V>
void add_features(const Call &call, const float *dmaps, const float *weight, const float *packed, ptrdiff_t maps,
                  ptrdiff_t depth, bool add, float *dx, float *transposed) {
    if (call.channels_first) {
        ptrdiff_t stride = (call.length + LARGE * LANES - 1) / (LARGE * LANES) * LARGE * LANES;
        transpose<V>(dmaps, call.length, maps, transposed, stride);
        add_columns<LARGE>(packed, V * LANES, transposed, stride, maps, dx, depth, call.length, call.length, add);
    } else {
        add_columns<LARGE>(dmaps, V * LANES, weight, depth, maps, dx, call.length, call.channels, depth, add);
    }
}

// Tasks are chunks of images and groups; then the packed gradients of the kernels are put together
template <int V>
void backward(const Call &call, float *buffer, float *packed_grads) {
    constexpr int PANEL = V * LANES;
    ptrdiff_t depth = call.key_depth + call.value_depth, panels = panels_of<V>(call), near = near_images(call);
    ptrdiff_t rows = depth + 1, size = panels * rows * PANEL;  // packed, of a panel, the bias last, and of a group
    float *scores = buffer + depth * PANEL, *values = scores + call.length * PANEL;
    float *grad = values + call.length * PANEL, *transposed = grad + PANEL;
    ptrdiff_t dx_channel = call.channels_first ? call.length : 1;
#pragma omp for schedule(dynamic, 1)
    for (ptrdiff_t task = 0; task < call.chunks * call.groups; task++) {
        ptrdiff_t chunk = task / call.groups, group = task % call.groups;
        ptrdiff_t begin = call.batch * chunk / call.chunks, last = call.batch * (chunk + 1) / call.chunks;
        for (ptrdiff_t some = begin; some < last; some += near) {
            for (ptrdiff_t p = 0; p < panels; p++) {
                Panel<V> panel(call, group, p * PANEL, buffer);
                float *dkey = packed_grads + (chunk * call.groups + group) * size + p * rows * PANEL;
                float *dvalue = dkey + call.key_depth * PANEL, *dbias = dkey + depth * PANEL;
                if (some == begin) memset(dbias, 0, PANEL * sizeof(float));
                for (ptrdiff_t image = some; image < std::min(some + near, last); image++) {
                    const float *x = call.x + image * call.image_stride;
                    panel.embed(call, x, image, scores, values);
                    memset(grad, 0, PANEL * sizeof(float));
                    memcpy(grad, call.grad + image * call.groups * call.maps + panel.row, panel.maps * sizeof(float));
                    Dropout<V> dropout(call, image, panel.row);
                    derive<V>(scores, values, call.length, grad, call.drop_rate ? &dropout : nullptr, dbias);
                    if (call.dkey_weight) {
                        multiply<V>(x + panel.key_channel * call.channel_stride, call.key_depth, call.channel_stride,
                                    call.position_stride, scores, call.length, image == begin, dkey);
                        multiply<V>(x + panel.value_channel * call.channel_stride, call.value_depth,
                                    call.channel_stride, call.position_stride, values, call.length, image == begin,
                                    dvalue);
                    }
                    if (call.dx) {
                        float *dx = call.dx + image * call.length * call.channels;
                        add_features<V>(call, scores, panel.key_weight, panel.key, panel.maps, call.key_depth,
                                        p > 0, dx + panel.key_channel * dx_channel, transposed);
                        add_features<V>(call, values, panel.value_weight, panel.value, panel.maps, call.value_depth,
                                        p > 0 || call.value_adds, dx + panel.value_channel * dx_channel, transposed);
                    }
                }
            }
        }
    }
    if (!call.dkey_weight) return;
#pragma omp for schedule(dynamic, 1)
    for (ptrdiff_t task = 0; task < call.groups * panels; task++) {
        ptrdiff_t group = task / panels, map = task % panels * PANEL, row = group * call.maps + map;
        ptrdiff_t maps = std::min<ptrdiff_t>(call.maps - map, PANEL);
        float *sum = packed_grads + task * rows * PANEL;
        for (ptrdiff_t chunk = 1; chunk < call.chunks; chunk++)
            for (ptrdiff_t i = 0; i < rows * V; i++)
                ((Vector *)sum)[i] += ((Vector *)(sum + chunk * call.groups * size))[i];
        transpose<V>(sum, call.key_depth, maps, call.dkey_weight + row * call.key_depth, call.key_depth);
        transpose<V>(sum + call.key_depth * PANEL, call.value_depth, maps,
                     call.dvalue_weight + row * call.value_depth, call.value_depth);
        if (call.dvalue_bias) memcpy(call.dvalue_bias + row, sum + depth * PANEL, maps * sizeof(float));
    }
}

// A team of threads, each with a buffer; gives 0, or -1 if there is no memory
template <int V>
int run(const Call &call) {
    constexpr int PANEL = V * LANES;
    ptrdiff_t depth = call.key_depth + call.value_depth;
    ptrdiff_t floats = ((depth + 3 * call.length + LARGE * LANES + 1) * PANEL + 15) / 16 * 16;  // of a thread, aligned
    float *packed_grads = nullptr;
    if (call.grad) {
        packed_grads = allocate(call.chunks * call.groups * panels_of<V>(call) * (depth + 1) * PANEL);
        if (!packed_grads) return -1;
    }
    float *buffers = allocate(call.threads * floats);
    if (buffers) {
#pragma omp parallel num_threads(call.threads)
        {
            float *buffer = buffers + omp_get_thread_num() * floats;
            if (call.grad)
                backward<V>(call, buffer, packed_grads);
            else
                forward<V>(call, buffer);
        }
    }
    int result = buffers ? 0 : -1;
    free(buffers);
    free(packed_grads);
    return result;
}

int run(const Call &call) { return call.maps > SMALL * LANES ? run<LARGE>(call) : run<SMALL>(call); }
