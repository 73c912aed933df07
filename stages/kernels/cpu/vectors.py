"""Vector operations that numba's compiler does not find by itself, as numba intrinsics: written in LLVM's own terms.

LLVM turns loops over a hash level's rows into gather instructions, which cost twice what plain loads of a row's pair
of features do; it keeps no tile of a matrix product in registers, and tests a triangle's pixels one by one. All else is
plain numba.

Arrays are C-contiguous; places in them are flat offsets. No bounds are checked.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

ROWS, COLUMNS, NARROW = (
    4,
    16,
    4,
)  # of a tile (4 registers of AVX-512, 8 of AVX2's 16) and of a narrow one; NARROW % ROWS == 0
CORNERS, BLOCK = 8, 256  # of a cell; points that share a block of rows and weights
PIXELS = 8  # of a row, tested at once

_I32, _I64, _F32, _F64 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
_PAIR = ir.VectorType(_F32, 2)
_CONTRACT = ("contract",)  # a * b + c may be rounded once


class _Code:
    """Code generation shared by the intrinsics: arrays' data, vector loads and stores."""

    def __init__(self, context, builder, signature, arguments) -> None:
        self.builder, self.values = builder, []
        for kind, value in zip(signature.args, arguments, strict=True):
            if isinstance(kind, types.Array):
                self.values.append(context.make_array(kind)(context, builder, value).data)
            else:
                target = types.intp if isinstance(kind, types.Integer) else kind
                self.values.append(context.cast(builder, value, kind, target))

    def load(self, data, at, kind=None):
        """A scalar, or a vector of `kind`, aligned like its elements."""
        pointer = self.builder.gep(data, [at])
        if kind is None:
            return self.builder.load(pointer)
        value = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        value.align = 4
        return value

    def store(self, vector, data, at) -> None:
        pointer = self.builder.bitcast(self.builder.gep(data, [at]), vector.type.as_pointer())
        self.builder.store(vector, pointer).align = 4

    def splat(self, scalar, kind):
        """The scalar in every lane."""
        zero = ir.Constant(_I32, 0)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, zero)
        lanes = ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count)
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), lanes)

    def multiply_add(self, a, b, c):
        return self.builder.fadd(self.builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)

    def row(self, rows, corner: int, p, start):
        """Offset in a table of a corner's pair of features."""
        at = self.builder.add(p, ir.Constant(_I64, corner * BLOCK))
        index = self.builder.add(self.builder.zext(self.load(rows, at), _I64), start)
        return at, self.builder.shl(index, ir.Constant(_I64, 1))


def _returning_nothing(generate):
    def codegen(context, builder, signature, arguments):
        generate(_Code(context, builder, signature, arguments))
        return context.get_dummy_value()

    return codegen


def _tile_of(columns: int):
    lanes = ir.VectorType(_F32, columns)

    def generate(code: _Code) -> None:
        builder = code.builder
        c, c_at, c_row, d, d_at, d_row, a, a_at, a_row, a_step, b, b_at, b_row, steps = code.values

        def row(start, stride, q: int):
            return builder.add(start, builder.mul(stride, ir.Constant(_I64, q)))

        sums = [
            cgutils.alloca_once_value(builder, code.load(d, row(d_at, d_row, q), lanes)) for q in range(ROWS)
        ]  # fmt: skip
        with cgutils.for_range(builder, steps) as loop:
            line = code.load(b, builder.add(b_at, builder.mul(loop.index, b_row)), lanes)
            first = builder.add(a_at, builder.mul(loop.index, a_step))
            for q, total in enumerate(sums):
                factor = code.splat(code.load(a, row(first, a_row, q)), lanes)
                builder.store(code.multiply_add(factor, line, builder.load(total)), total)
        for q, total in enumerate(sums):
            code.store(builder.load(total), c, row(c_at, c_row, q))

    return _returning_nothing(generate)


@intrinsic
def product_tile(typing, c, c_at, c_row, d, d_at, d_row, a, a_at, a_row, a_step, b, b_at, b_row, steps):
    """Compute a tile of c = d + a b in registers: c[q, j] = d[q, j] + sum over k < steps of a[q, k] b[k, j].

    q < ROWS, j < COLUMNS; element c[q, j] lies at c_at + q c_row + j, d[q, j] at d_at + q d_row + j, a[q, k] at
    a_at + q a_row + k a_step, b[k, j] at b_at + k b_row + j.
    """
    kinds = (c, c_at, c_row, d, d_at, d_row, a, a_at, a_row, a_step, b, b_at, b_row, steps)
    return types.void(*kinds), _tile_of(COLUMNS)


@intrinsic
def narrow_product_tile(typing, c, c_at, c_row, d, d_at, d_row, a, a_at, a_row, a_step, b, b_at, b_row, steps):
    """Compute a product_tile of NARROW columns."""
    kinds = (c, c_at, c_row, d, d_at, d_row, a, a_at, a_row, a_step, b, b_at, b_row, steps)
    return types.void(*kinds), _tile_of(NARROW)


@intrinsic
def fetch_rows(typing, table, start, rows, p):
    """Ask for table[start + rows[c, p]] for every corner ahead of its use: into the second cache, since a block's rows
    are more than the first holds."""

    def generate(code: _Code) -> None:
        table, start, rows, p = code.values
        builder, pointer, second = code.builder, ir.IntType(8).as_pointer(), 2
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        how = [ir.Constant(_I32, value) for value in (0, second, 1)]  # to read, of data
        for corner in range(CORNERS):
            _, row = code.row(rows, corner, p, start)
            builder.call(prefetch, [builder.bitcast(builder.gep(table, [row]), pointer), *how])

    return types.void(table, start, rows, p), _returning_nothing(generate)


@intrinsic
def gather_sum(typing, table, start, rows, weights, p, out, out_at):
    """Set out[out_at : out_at + 2] to the sum over c of weights[c, p] table[start + rows[c, p]]."""

    def generate(code: _Code) -> None:
        table, start, rows, weights, p, out, out_at = code.values
        total = ir.Constant(_PAIR, [0.0, 0.0])
        for corner in range(CORNERS):
            at, row = code.row(rows, corner, p, start)
            weight = code.splat(code.load(weights, at), _PAIR)
            total = code.multiply_add(weight, code.load(table, row, _PAIR), total)
        code.store(total, out, out_at)

    return types.void(table, start, rows, weights, p, out, out_at), _returning_nothing(generate)


@intrinsic
def gather_dot(typing, table, start, rows, p, g, g_at, out):
    """Set out[c, p] to table[start + rows[c, p]] . g[g_at : g_at + 2] for every corner; [CORNERS, BLOCK]."""

    def generate(code: _Code) -> None:
        table, start, rows, p, g, g_at, out = code.values
        builder = code.builder
        factor = code.load(g, g_at, _PAIR)
        for corner in range(CORNERS):
            at, row = code.row(rows, corner, p, start)
            product = builder.fmul(code.load(table, row, _PAIR), factor)
            low, high = (builder.extract_element(product, ir.Constant(_I32, k)) for k in range(2))
            builder.store(builder.fadd(low, high), builder.gep(out, [at]))

    return types.void(table, start, rows, p, g, g_at, out), _returning_nothing(generate)


@intrinsic
def scatter_add(typing, table, start, rows, p, weights, values, values_at):
    """Add weights[c, p] values[values_at : values_at + 2] to table[start + rows[c, p]], corner after corner."""

    def generate(code: _Code) -> None:
        table, start, rows, p, weights, values, values_at = code.values
        _scatter(code, table, start, rows, p, [(weights, code.load(values, values_at, _PAIR))])

    return types.void(table, start, rows, p, weights, values, values_at), _returning_nothing(generate)


@intrinsic
def scatter_add_two(typing, table, start, rows, p, weights, values, more_weights, more_values, values_at):
    """Add two weights and values at once, as scatter_add."""

    def generate(code: _Code) -> None:
        table, start, rows, p, weights, values, more_weights, more_values, values_at = code.values
        pairs = ((weights, values), (more_weights, more_values))
        _scatter(code, table, start, rows, p, [(w, code.load(v, values_at, _PAIR)) for w, v in pairs])

    kinds = (table, start, rows, p, weights, values, more_weights, more_values, values_at)
    return types.void(*kinds), _returning_nothing(generate)


def _scatter(code: _Code, table, start, rows, p, terms) -> None:
    for corner in range(CORNERS):
        at, row = code.row(rows, corner, p, start)
        total = code.load(table, row, _PAIR)
        for weights, value in terms:
            total = code.multiply_add(code.splat(code.load(weights, at), _PAIR), value, total)
        code.store(total, table, row)


@intrinsic
def hides(typing, depth, at, count, nearest):
    """Say whether all of depth[at : at + count], count <= PIXELS, is below `nearest`; reads PIXELS of them."""

    def generate(context, builder, signature, arguments):
        code = _Code(context, builder, signature, arguments)
        depth, at, count, nearest = code.values
        lanes, marks = ir.VectorType(_F64, PIXELS), ir.VectorType(_I64, PIXELS)
        beyond = builder.icmp_signed(">=", ir.Constant(marks, list(range(PIXELS))), code.splat(count, marks))
        nearer = builder.fcmp_ordered("<", code.load(depth, at, lanes), code.splat(nearest, lanes))
        bits = ir.IntType(PIXELS)
        return builder.icmp_unsigned("==", builder.bitcast(builder.or_(beyond, nearer), bits), ir.Constant(bits, -1))

    return types.boolean(depth, at, count, nearest), generate


@intrinsic
def write_pixel(typing, clip, triangles, number, fx, fy, depth, depth_at, rast, at):
    """Set rast[at : at + 4] to (u, v, depth[depth_at], number): the ray's barycentrics in triangle number - 1.

    The corners' x and y are taken with the pixel's ray (fx, fy) moved to the origin: homogeneous, perspective-exact.
    clip: [V, 4] float32; triangles: [F, 3] int32; number: at least 1. All is computed in float64, products and sums
    rounded one by one.
    """

    def generate(code: _Code) -> None:
        builder = code.builder
        clip, triangles, number, fx, fy, depth, depth_at, rast, at = code.values
        two, four = ir.VectorType(_F64, 2), ir.VectorType(_F32, 4)

        def pick(vector, *lanes: int):
            return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))

        ray = builder.insert_element(code.splat(fx, two), fy, ir.Constant(_I32, 1))
        corners = []
        first = builder.mul(builder.sub(number, ir.Constant(_I64, 1)), ir.Constant(_I64, 3))
        for k in range(3):
            corner = builder.zext(code.load(triangles, builder.add(first, ir.Constant(_I64, k))), _I64)
            point = code.load(clip, builder.shl(corner, ir.Constant(_I64, 2)), four)
            wide = builder.fpext(point, ir.VectorType(_F64, 4))
            corners.append(builder.fsub(pick(wide, 0, 1), builder.fmul(ray, pick(wide, 3, 3))))
        areas = []
        for k in range(3):
            product = builder.fmul(corners[(k + 1) % 3], pick(corners[(k + 2) % 3], 1, 0))
            low, high = (builder.extract_element(product, ir.Constant(_I32, lane)) for lane in range(2))
            areas.append(builder.fsub(low, high))
        scale = builder.fdiv(ir.Constant(_F64, 1.0), builder.fadd(builder.fadd(areas[0], areas[1]), areas[2]))
        out = ir.Constant(four, ir.Undefined)
        nearest = code.load(depth, depth_at)
        parts = [builder.fptrunc(v, _F32) for v in (*(builder.fmul(d, scale) for d in areas[:2]), nearest)]
        for lane, value in enumerate((*parts, builder.sitofp(number, _F32))):
            out = builder.insert_element(out, value, ir.Constant(_I32, lane))
        code.store(out, rast, at)

    kinds = (clip, triangles, number, fx, fy, depth, depth_at, rast, at)
    return types.void(*kinds), _returning_nothing(generate)


@intrinsic
def draw_pixels(typing, depth, ids, at, x, right, number, edges, z0, z1, z2, inverse):
    """Write depth and number of a triangle where it covers pixel centres x + 0.5 .. < right, is nearest and in [-1, 1].

    Of equal depths the lower number is kept, whichever comes first.
    Takes PIXELS columns from x on, whose depth [.] float64 and ids [.] int32 lie from `at` on, also those beyond right.
    edges: slope and value at x = 0 of the three edge functions in this row, six float64; z0, z1, z2: depths of the
    corners opposite them; inverse: of twice the area. Products and sums are rounded one by one.
    """

    def generate(code: _Code) -> None:
        builder = code.builder
        depth, ids, at, x, right, number, edges, z0, z1, z2, inverse = code.values
        lanes, marks = ir.VectorType(_F64, PIXELS), ir.VectorType(_I32, PIXELS)

        def every(value: float):
            return ir.Constant(lanes, [value] * PIXELS)

        centre = builder.fadd(
            code.splat(builder.sitofp(x, _F64), lanes), ir.Constant(lanes, [k + 0.5 for k in range(PIXELS)])
        )
        covered = builder.fcmp_ordered("<", centre, code.splat(builder.sitofp(right, _F64), lanes))
        total = None
        for k, z in enumerate((z0, z1, z2)):
            slope, start = (builder.extract_value(edges, 2 * k + j) for j in range(2))
            weight = builder.fadd(builder.fmul(code.splat(slope, lanes), centre), code.splat(start, lanes))
            covered = builder.and_(covered, builder.fcmp_ordered(">=", weight, every(0.0)))
            term = builder.fmul(weight, code.splat(z, lanes))
            total = term if total is None else builder.fadd(total, term)
        new_depth = builder.fmul(total, code.splat(inverse, lanes))
        old_depth, old_id = code.load(depth, at, lanes), code.load(ids, at, marks)
        new_id = code.splat(builder.trunc(number, _I32), marks)
        for sign, bound in ((">=", -1.0), ("<=", 1.0)):
            covered = builder.and_(covered, builder.fcmp_ordered(sign, new_depth, every(bound)))
        tie = builder.and_(builder.fcmp_ordered("==", new_depth, old_depth), builder.icmp_signed("<", new_id, old_id))
        covered = builder.and_(covered, builder.or_(tie, builder.fcmp_ordered("<", new_depth, old_depth)))
        # Always stored: whether any of them is drawn cannot be foretold, and a wrong guess costs more than two stores.
        code.store(builder.select(covered, new_depth, old_depth), depth, at)
        code.store(builder.select(covered, new_id, old_id), ids, at)

    return types.void(depth, ids, at, x, right, number, edges, z0, z1, z2, inverse), _returning_nothing(generate)
