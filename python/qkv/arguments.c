/* arguments.c - reads the arguments of calls from Python.
 * SPDX-License-Identifier: Apache-2.0 */
#include "arguments.h"

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <string.h>

/* ---- names ---------------------------------------------------------------------------------------- */

/* The end of a parameter's text: the comma or bracket outside of any brackets of its default. */
static const char *parameter_end(const char *p)
{
    int depth = 0;
    for (; *p && (depth || (*p != ',' && *p != ')')); p++) {
        if (*p == '(') depth++;
        if (*p == ')') depth--;
    }
    return p;
}

int read_signature(signature *s)
{
    if (s->num_names) return 0;
    const char *p = strchr(s->text, '(');
    PyObject *function = PyUnicode_FromStringAndSize(s->text, p - s->text);
    if (!function || !(s->function = PyUnicode_AsUTF8AndSize(function, NULL))) return -1;
    int keyword_only = 0;
    for (p++; *p != ')';) {
        const char *end = parameter_end(p);
        const size_t len = strcspn(p, "=,)");
        if (*p == '*') {
            keyword_only = 1;
        } else if (*p != '$') { /* $self is not among the arguments */
            if (s->num_names == MAX_ARGUMENTS) {
                PyErr_Format(PyExc_SystemError, "%s has too many parameters", s->function);
                return -1;
            }
            PyObject *name = PyUnicode_FromStringAndSize(p, (Py_ssize_t)len);
            if (!name) return -1;
            PyUnicode_InternInPlace(&name);
            s->required[s->num_names] = p[len] != '=';
            s->names[s->num_names++] = name;
            s->num_positional += !keyword_only;
        }
        p = end + (*end == ',');
        p += strspn(p, " \n");
    }
    return 0;
}

/* Which parameter a keyword names, or -1. Callers' keywords are interned, so that a look at pointers is
 * nearly always enough. */
static int find_name(const signature *s, PyObject *key)
{
    for (int i = 0; i < s->num_names; i++) {
        if (s->names[i] == key) return i;
    }
    for (int i = 0; i < s->num_names; i++) {
        if (PyUnicode_Compare(s->names[i], key) == 0) return i;
    }
    return -1;
}

static int take_keyword(const signature *s, PyObject *key, PyObject *value, PyObject **values)
{
    const int i = find_name(s, key);
    if (i < 0) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_TypeError, "%s() has no parameter %R", s->function, key);
        }
        return -1;
    }
    if (values[i]) {
        PyErr_Format(PyExc_TypeError, "%s(): %U is given twice", s->function, key);
        return -1;
    }
    values[i] = value;
    return 0;
}

static int check_positional(const signature *s, Py_ssize_t nargs)
{
    if (nargs <= s->num_positional) return 0;
    PyErr_Format(PyExc_TypeError, "%s() takes %d positional arguments, got %zd", s->function,
                 s->num_positional, nargs);
    return -1;
}

static int check_required(const signature *s, PyObject *const *values)
{
    for (int i = 0; i < s->num_names; i++) {
        if (values[i] || !s->required[i]) continue;
        PyErr_Format(PyExc_TypeError, "%s() misses the argument %R", s->function, s->names[i]);
        return -1;
    }
    return 0;
}

int read_call(const signature *s, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
              PyObject **values)
{
    if (check_positional(s, nargs)) return -1;
    for (int i = 0; i < s->num_names; i++) values[i] = i < nargs ? args[i] : NULL;
    const Py_ssize_t num_keywords = kwnames ? PyTuple_Size(kwnames) : 0;
    for (Py_ssize_t i = 0; i < num_keywords; i++) {
        if (take_keyword(s, PyTuple_GetItem(kwnames, i), args[nargs + i], values)) return -1;
    }
    return check_required(s, values);
}

int read_call_dict(const signature *s, PyObject *args, PyObject *kwargs, PyObject **values)
{
    const Py_ssize_t nargs = args ? PyTuple_Size(args) : 0;
    if (check_positional(s, nargs)) return -1;
    for (int i = 0; i < s->num_names; i++) values[i] = i < nargs ? PyTuple_GetItem(args, i) : NULL;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; kwargs && PyDict_Next(kwargs, &at, &key, &value);) {
        if (!PyUnicode_Check(key)) {
            PyErr_Format(PyExc_TypeError, "%s(): names must be strings, got %R", s->function, key);
            return -1;
        }
        if (take_keyword(s, key, value, values)) return -1;
    }
    return check_required(s, values);
}

/* ---- scalars -------------------------------------------------------------------------------------- */

/* Replaces the exception of a failed conversion by one that names the argument. */
static int wrong_type(const char *name, const char *expected, PyObject *value)
{
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: expected %s, got %R", name, expected, value);
    return -1;
}

int read_i64(PyObject *value, const char *name, int64_t *out)
{
    if (absent(value)) return 0;
    PyObject *index = PyNumber_Index(value);
    if (!index) return wrong_type(name, "an integer", value);
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (number == -1 && PyErr_Occurred()) return -1;
    if (overflow) {
        raise_error(QKV_ERR_INVALID, "%s: expected an integer of 64 bits", name);
        return -1;
    }
    *out = number;
    return 0;
}

int read_i32(PyObject *value, const char *name, int32_t *out)
{
    int64_t number = *out;
    if (read_i64(value, name, &number)) return -1;
    if (number < INT32_MIN || number > INT32_MAX) {
        raise_error(QKV_ERR_INVALID, "%s: expected an integer of 32 bits, got %lld", name,
                    (long long)number);
        return -1;
    }
    *out = (int32_t)number;
    return 0;
}

int read_u64(PyObject *value, const char *name, uint64_t *out)
{
    if (absent(value)) return 0;
    PyObject *index = PyNumber_Index(value);
    if (!index) return wrong_type(name, "an integer", value);
    *out = PyLong_AsUnsignedLongLongMask(index);
    Py_DECREF(index);
    return 0;
}

int read_f32(PyObject *value, const char *name, float *out)
{
    if (absent(value)) return 0;
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) return wrong_type(name, "a number", value);
    *out = (float)number;
    if (isfinite(number) && !isfinite(*out)) {
        raise_error(QKV_ERR_INVALID, "%s: expected a number within f32, got %g", name, number);
        return -1;
    }
    return 0;
}

int read_flag(PyObject *value, const char *name, int32_t *out)
{
    if (absent(value)) return 0;
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) return wrong_type(name, "True or False", value);
    *out = truth;
    return 0;
}

int read_word(PyObject *value, const char *name, int32_t *out, ...)
{
    if (absent(value)) return 0;
    char expected[160] = "";
    size_t used = 0;
    va_list words;
    va_start(words, out);
    int32_t i = 0;
    for (const char *word; (word = va_arg(words, const char *)); i++) {
        if (PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, word) == 0) {
            *out = i;
            va_end(words);
            return 0;
        }
        const int more =
            snprintf(expected + used, sizeof expected - used, "%s\"%s\"", i ? " or " : "", word);
        used += (size_t)more < sizeof expected - used ? (size_t)more : 0;
    }
    va_end(words);
    PyErr_Clear();
    PyObject *got = PyObject_Repr(value);
    const char *text = got ? PyUnicode_AsUTF8AndSize(got, NULL) : NULL;
    if (text) raise_error(QKV_ERR_INVALID, "%s: expected %s, got %s", name, expected, text);
    Py_XDECREF(got);
    return -1;
}

int read_text(PyObject *value, const char *name, const char **out, PyObject **keep)
{
    *out = NULL;
    *keep = NULL;
    if (absent(value)) return 0;
    if (!PyUnicode_Check(value)) return wrong_type(name, "a string", value);
    Py_ssize_t size;
    *out = PyUnicode_AsUTF8AndSize(value, &size);
    if (!*out) return -1;
    if (strlen(*out) != (size_t)size) {
        raise_error(QKV_ERR_INVALID, "%s: expected text without NUL characters", name);
        return -1;
    }
    Py_INCREF(value);
    *keep = value;
    return 0;
}

/* ---- dtypes --------------------------------------------------------------------------------------- */

static const struct {
    const char *short_name, *long_name;
    DLDataType dtype;
} dtypes[] = {
    {"f32", "float32", {2, 32, 1}},      {"f16", "float16", {2, 16, 1}},
    {"bf16", "bfloat16", {4, 16, 1}},    {"e4m3", "float8_e4m3fn", {10, 8, 1}},
    {"e5m2", "float8_e5m2", {12, 8, 1}}, {"i8", "int8", {0, 8, 1}},
    {"i32", "int32", {0, 32, 1}},        {"i64", "int64", {0, 64, 1}},
    {"u8", "uint8", {1, 8, 1}},          {"u64", "uint64", {1, 64, 1}},
    {"f64", "float64", {2, 64, 1}},      {"i16", "int16", {0, 16, 1}},
    {"u16", "uint16", {1, 16, 1}},       {"u32", "uint32", {1, 32, 1}},
    {"bool", "bool", {6, 8, 1}},
};
enum { NUM_DTYPES = sizeof dtypes / sizeof dtypes[0] };

const char *dtype_name(DLDataType dtype)
{
    for (int i = 0; i < NUM_DTYPES; i++) {
        const DLDataType d = dtypes[i].dtype;
        if (d.code == dtype.code && d.bits == dtype.bits && dtype.lanes == 1) {
            return dtypes[i].long_name;
        }
    }
    return NULL;
}

/* What a framework's dtype is called: "torch.bfloat16" says it itself, a class and numpy.dtype have it as
 * an attribute. */
static PyObject *dtype_text(PyObject *value)
{
    if (PyUnicode_Check(value)) {
        Py_INCREF(value);
        return value;
    }
    PyObject *name = PyObject_GetAttrString(value, PyType_Check(value) ? "__name__" : "name");
    if (name && PyUnicode_Check(name)) return name;
    PyErr_Clear();
    Py_XDECREF(name);
    return PyObject_Str(value);
}

int read_dtype(PyObject *value, const char *name, DLDataType *out)
{
    if (absent(value)) return 0;
    PyObject *owner = dtype_text(value);
    const char *text = owner ? PyUnicode_AsUTF8AndSize(owner, NULL) : NULL;
    if (!text) {
        Py_XDECREF(owner);
        return -1;
    }
    const char *dot = strrchr(text, '.');
    const char *last = dot ? dot + 1 : text;
    int found = 0;
    for (int i = 0; i < NUM_DTYPES && !found; i++) {
        if (strcmp(last, dtypes[i].short_name) != 0 && strcmp(last, dtypes[i].long_name) != 0)
            continue;
        *out = dtypes[i].dtype;
        found = 1;
    }
    if (!found) {
        raise_error(QKV_ERR_INVALID,
                    "%s: expected \"f32\", \"bf16\" or the like, or a framework's dtype, got %s",
                    name, text);
    }
    Py_DECREF(owner);
    return found ? 0 : -1;
}

/* ---- records -------------------------------------------------------------------------------------- */

int read_rope_fields(PyObject *const *v, int of_rope, qkv_rope_spec *out)
{
#define NAME(field) (of_rope ? "rope." field : field)
    return read_i32(v[0], NAME("rotary_dim"), &out->rotary_dim) ||
                   read_flag(v[1], NAME("interleaved"), &out->interleaved) ||
                   read_f32(v[2], NAME("theta"), &out->theta) ||
                   read_f32(v[3], NAME("scale"), &out->scale) ||
                   read_f32(v[4], NAME("low_freq"), &out->low_freq) ||
                   read_f32(v[5], NAME("high_freq"), &out->high_freq) ||
                   read_f32(v[6], NAME("old_context"), &out->old_context)
               ? -1
               : 0;
#undef NAME
}

int read_rope(PyObject *value, const char *name, qkv_rope_spec *out, int *given)
{
    *given = 0;
    if (absent(value)) return 0;
    if (!PyTuple_Check(value) || PyTuple_Size(value) != 7) {
        return wrong_type(name, "a qkv.Rope", value);
    }
    PyObject *fields[7];
    for (int i = 0; i < 7; i++) fields[i] = PyTuple_GetItem(value, i);
    *given = 1;
    return read_rope_fields(fields, 1, out);
}
