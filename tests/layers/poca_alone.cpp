// Both passes of one call, without Python: for processors that are emulated.
//     poca_alone FILE FILE
// The first has the numbers of Numbers, then floats: features, kernels, the bias, gradients of what comes out. The second
// gets what comes out, and the gradients of features, kernels and bias. RUN is the function, poca_run_neon say.

#include "../../noah_zoo/layers/poca_cpu.cpp"

#include <cstdio>
#include <vector>

struct Numbers {
    int64_t batch, length, channels, groups, maps, key_depth, value_depth, threads, channels_first, value_adds, chunks;
    uint64_t seed;
    double drop_rate;
};

int main(int, char **paths) {
    Numbers n;
    FILE *in = fopen(paths[1], "rb"), *to = fopen(paths[2], "wb");
    if (!in || !to || fread(&n, sizeof n, 1, in) != 1) return 1;
    const int64_t all = n.groups * n.maps, sizes[] = {n.batch * n.length * n.channels, all * n.key_depth,
                                                      all * n.value_depth, all, n.batch * all};
    std::vector<float> given[5], dx(sizes[0]), dkey(sizes[1]), dvalue(sizes[2]), dbias(sizes[3]), out(sizes[4]);
    for (int i = 0; i < 5; i++) {
        given[i].resize(sizes[i]);
        if (fread(given[i].data(), 4, sizes[i], in) != (size_t)sizes[i]) return 1;
    }
    bool first = n.channels_first;
    Call call{given[0].data(), n.length * n.channels, first ? 1 : n.channels, first ? n.length : 1, given[1].data(),
              given[2].data(), out.data(), n.batch, n.length, n.channels, n.groups, n.maps, n.key_depth, n.value_depth,
              n.threads, nullptr, dx.data(), dkey.data(), dvalue.data(), n.channels_first, n.value_adds, n.chunks,
              given[3].data(), dbias.data(), n.seed, (float)n.drop_rate};
    if (RUN(&call)) return 2;
    call.grad = given[4].data();
    if (RUN(&call)) return 2;
    for (auto *result : {&out, &dx, &dkey, &dvalue, &dbias}) fwrite(result->data(), 4, result->size(), to);
    return fclose(to);
}
