/* Weight gradients of a convolution, example by example, with their squared norms: products that stay in the cache.
 *
 * Compiled after rows.c. A one-dimensional convolution has height 1. Sums over positions are taken in blocks, each from
 * zero, so that their rounding grows with the length of a block and the number of blocks, not with the product.
 */
#define TALL 8                /* rows of a tile of the product; a tile is two vectors wide */
#define PATCH_FLOATS 65536    /* of a block of patches: a quarter of a MiB, in the second-level cache */
#define LEAST_PLACES 128      /* of a block: of a tile, 16 KiB of patches are in the first-level cache for all rows */

struct convolution {
    int64_t batch, groups, channels, outs; /* channels and outs of one group */
    int64_t height, width, kernel_height, kernel_width, out_height, out_width;
    int64_t stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
};

/* out[r][0 .. 2 WIDE) = or += sum_t grads[r * grads_row + t] patches[t * patch_row + 0 .. 2 WIDE) */
static inline __attribute__((always_inline)) void add_tile(
    const float *grads, int64_t grads_row, const float *patches, int64_t patch_row, int64_t places,
    float *out, int64_t out_row, int fresh, int tall)
{
    floats sums[TALL][2];
    memset(sums, 0, sizeof sums);
    for (int64_t t = 0; t < places; t++) {
        floats left = load(patches + t * patch_row), right = load(patches + t * patch_row + WIDE);
        for (int r = 0; r < tall; r++) {
            float factor = grads[r * grads_row + t];
            sums[r][0] += factor * left;
            sums[r][1] += factor * right;
        }
    }
    for (int r = 0; r < tall; r++)
        for (int k = 0; k < 2; k++) {
            float *to = out + r * out_row + k * WIDE;
            store(to, fresh ? sums[r][k] : load(to) + sums[r][k]);
        }
}

static void add_tiles(const float *grads, int64_t grads_row, const float *patches, int64_t patch_row, int64_t places,
                      float *out, int64_t out_row, int fresh, int64_t rows)
{
    int64_t o = 0; /* heights are constants, so that the sums stay in registers */
    for (; o + TALL <= rows; o += TALL)
        add_tile(grads + o * grads_row, grads_row, patches, patch_row, places, out + o * out_row, out_row, fresh, TALL);
    for (; o + 3 <= rows; o += 3)
        add_tile(grads + o * grads_row, grads_row, patches, patch_row, places, out + o * out_row, out_row, fresh, 3);
    for (; o < rows; o++)
        add_tile(grads + o * grads_row, grads_row, patches, patch_row, places, out + o * out_row, out_row, fresh, 1);
}

static inline __attribute__((always_inline)) void copy_patches(
    const struct convolution *c, const float *image, int64_t rows, int64_t columns, int64_t start, int64_t stop,
    float *out, int64_t out_row, int64_t kernel_width, int64_t dilation_x)
{
    for (int64_t t = start; t < stop; t++) {
        const float *corner = image + t / c->out_width * c->stride_y * columns + t % c->out_width * c->stride_x;
        float *to = out + (t - start) * out_row;
        for (int64_t channel = 0; channel < c->channels; channel++)
            for (int64_t y = 0; y < c->kernel_height; y++) {
                const float *from = corner + (channel * rows + y * c->dilation_y) * columns;
                if (dilation_x == 1)
                    memcpy(to, from, (size_t)kernel_width * sizeof(float));
                else
                    for (int64_t x = 0; x < kernel_width; x++)
                        to[x] = from[x * dilation_x];
                to += kernel_width;
            }
    }
}

static void patches_of(const struct convolution *c, const float *image, int64_t rows, int64_t columns, int64_t start,
                       int64_t stop, float *out, int64_t out_row)
{
    switch (c->dilation_x == 1 ? c->kernel_width : 0) { /* constants, so that runs are copied without a loop */
        case 1: copy_patches(c, image, rows, columns, start, stop, out, out_row, 1, 1); break;
        case 3: copy_patches(c, image, rows, columns, start, stop, out, out_row, 3, 1); break;
        case 4: copy_patches(c, image, rows, columns, start, stop, out, out_row, 4, 1); break;
        case 5: copy_patches(c, image, rows, columns, start, stop, out, out_row, 5, 1); break;
        case 7: copy_patches(c, image, rows, columns, start, stop, out, out_row, 7, 1); break;
        case 8: copy_patches(c, image, rows, columns, start, stop, out, out_row, 8, 1); break;
        default: copy_patches(c, image, rows, columns, start, stop, out, out_row, c->kernel_width, c->dilation_x);
    }
}

#define LARGEST 0x1p178 /* square of a patch's norm: LARGEST_OPERAND of per_example.py */

/* sizes[t] += |patch_t| |g_t| over a block of places, infinite where the patch is too large; room for one number a
 * place. */
static void add_sizes(const float *grads, int64_t outs, const float *patches, int64_t patch_row, int64_t places,
                      double *room, double *sizes)
{
    memset(room, 0, (size_t)places * sizeof(double));
    for (int64_t o = 0; o < outs; o++)
        for (int64_t t = 0; t < places; t++)
            room[t] += (double)grads[o * places + t] * grads[o * places + t];
    for (int64_t t = 0; t < places; t++) {
        double patch = squares(patches + t * patch_row, patch_row);
        sizes[t] += patch > LARGEST ? (double)INFINITY : sqrt(room[t] * patch);
    }
}

struct work {
    float *image, *patches, *grads, *product;
    double *room, squared;
    int64_t patch, patch_row, block;
};

/* Adds the gradients [outs, patch] of one group of one example to product, or puts them there if it is fresh. */
static void add_group(const struct convolution *c, const float *image, const float *grads, float weight, double *sizes,
                      struct work *w, float *product, int fresh)
{
    int64_t rows = c->height + 2 * c->pad_y, columns = c->width + 2 * c->pad_x;
    int64_t places = c->out_height * c->out_width, row = w->patch_row;
    for (int64_t start = 0; start < places; start += w->block) {
        int64_t count = start + w->block < places ? w->block : places - start;
        patches_of(c, image, rows, columns, start, start + count, w->patches, row);
        for (int64_t o = 0; o < c->outs; o++) /* a block of them stays in the cache */
            for (int64_t t = 0; t < count; t++)
                w->grads[o * count + t] = weight * grads[o * places + start + t];
        for (int64_t k = 0; k < row; k += 2 * WIDE)
            add_tiles(w->grads, count, w->patches + k, row, count, product + k, row, fresh && start == 0, c->outs);
        if (sizes)
            add_sizes(w->grads, c->outs, w->patches, row, count, w->room, sizes + start);
    }
}

/* Copies rows of a matrix whose rows are longer, or back. */
static void copy_rows(float *to, int64_t to_row, const float *from, int64_t from_row, int64_t width, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        memcpy(to + i * to_row, from + i * from_row, (size_t)width * sizeof(float));
}

/* The input of one example with its padding, and with zeros in place of NaN and inf if clean. */
static void pad(const struct convolution *c, const float *input, float *out, int clean)
{
    int64_t rows = c->height + 2 * c->pad_y, columns = c->width + 2 * c->pad_x;
    for (int64_t channel = 0; channel < c->groups * c->channels; channel++)
        for (int64_t y = 0; y < c->height; y++) {
            const float *from = input + (channel * c->height + y) * c->width;
            float *to = out + (channel * rows + y + c->pad_y) * columns + c->pad_x;
            if (!clean)
                memcpy(to, from, (size_t)c->width * sizeof(float));
            else
                for (int64_t x = 0; x < c->width; x++)
                    to[x] = cleaned_one(from[x]);
        }
}

/* Work space of one thread; 0 where memory is short. */
static int set_up(const struct convolution *c, struct work *w, int copies_image)
{
    int64_t places = c->out_height * c->out_width;
    int64_t plane = (c->height + 2 * c->pad_y) * (c->width + 2 * c->pad_x);
    w->patch = c->channels * c->kernel_height * c->kernel_width;
    w->patch_row = (w->patch + 2 * WIDE - 1) / (2 * WIDE) * (2 * WIDE);
    w->block = PATCH_FLOATS / w->patch_row < LEAST_PLACES ? LEAST_PLACES : PATCH_FLOATS / w->patch_row;
    w->block = w->block < places ? w->block : places;
    w->image = copies_image ? calloc((size_t)(c->groups * c->channels * plane), sizeof(float)) : NULL;
    w->patches = calloc((size_t)(w->block * w->patch_row), sizeof(float)); /* the end of every row stays zero */
    w->grads = malloc((size_t)(c->outs * w->block) * sizeof(float));
    w->product = calloc((size_t)(c->groups * c->outs * w->patch_row), sizeof(float));
    w->room = malloc((size_t)w->block * sizeof(double));
    return w->patches && w->grads && w->product && w->room && (w->image || !copies_image);
}

static void tear_down(struct work *w)
{
    free(w->image);
    free(w->patches);
    free(w->grads);
    free(w->product);
    free(w->room);
}

/* found [batch, groups * outs, patch], or sizes [batch, places], the other NULL; 0 where memory is short. */
int convolution_rows(const struct convolution *c, const float *input, const float *grads, float *found, double *squared,
                     double *sizes, int threads)
{
    int64_t places = c->out_height * c->out_width, plane = (c->height + 2 * c->pad_y) * (c->width + 2 * c->pad_x);
    int padded = c->pad_y || c->pad_x, done = 1;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : done)
    {
        struct work w;
        done = set_up(c, &w, padded);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < c->batch; i++) {
            const float *from = input + i * c->groups * c->channels * c->height * c->width;
            if (!done)
                continue;
            if (padded) {
                pad(c, from, w.image, 0);
                from = w.image;
            }
            double *size = sizes ? sizes + i * places : NULL;
            w.squared = 0;
            if (size)
                memset(size, 0, (size_t)places * sizeof(double));
            for (int64_t g = 0; g < c->groups; g++) {
                int64_t at = (i * c->groups + g) * c->outs;
                add_group(c, from + g * c->channels * plane, grads + at * places, 1, size, &w, w.product, 1);
                for (int64_t o = 0; o < c->outs; o++)
                    w.squared += squares(w.product + o * w.patch_row, w.patch);
                if (found)
                    copy_rows(found + at * w.patch, w.patch, w.product, w.patch_row, w.patch, c->outs);
            }
            squared[i] = w.squared;
        }
        tear_down(&w);
    }
    return done;
}

/* total [groups * outs, patch] += sum_i weights[i] gradient_i; NaN and inf count as 0. Memory short: 0.
 *
 * Every thread takes its share of examples, and the shares are added in their order: the same bits every time.
 */
int convolution_sum(const struct convolution *c, const float *input, const float *grads, const float *weights,
                    float *total, int threads)
{
    int64_t places = c->out_height * c->out_width, plane = (c->height + 2 * c->pad_y) * (c->width + 2 * c->pad_x);
    int64_t outs = c->groups * c->outs, elements = outs * places;
    int done = 1;
#pragma omp parallel for schedule(static, 1) ordered num_threads(threads) if (threads > 1) reduction(&& : done)
    for (int share = 0; share < threads; share++) {
        struct work w;
        float *clean = malloc((size_t)elements * sizeof(float));
        int ready = set_up(c, &w, 1) && clean;
        done = done && ready; /* a thread may have several shares */
        for (int64_t i = c->batch * share / threads; done && i < c->batch * (share + 1) / threads; i++) {
            pad(c, input + i * c->groups * c->channels * c->height * c->width, w.image, 1);
            for (int64_t t = 0; t < elements; t++)
                clean[t] = cleaned_one(grads[i * elements + t]);
            for (int64_t g = 0; g < c->groups; g++)
                add_group(c, w.image + g * c->channels * plane, clean + g * c->outs * places, weights[i], NULL, &w,
                          w.product + g * c->outs * w.patch_row, 0);
        }
#pragma omp ordered
        for (int64_t o = 0; done && o < outs; o++)
            for (int64_t k = 0; k < w.patch; k++)
                total[o * w.patch + k] += w.product[o * w.patch_row + k];
        free(clean);
        tear_down(&w);
    }
    return done;
}
